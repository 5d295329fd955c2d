"""Tables of cells from known laws."""

import numpy as np

from experiments.scaling import coverage
from sae_jax.scaling import forms
from sae_jax.scaling.cells import Cell

# Gao et al.'s, and two of other shapes.
COEFFICIENTS = coverage.COEFFICIENTS


def grid(powers, ks):
  """n and k of all pairs, [R] each."""
  n_R, k_R = np.meshgrid([2.0**power for power in powers], ks)
  return n_R.ravel(), k_R.ravel().astype(float)


def losses(theta, n_R, k_R, noise=0.0, seed=0):
  """Losses of the surface with log-normal noise."""
  rng = np.random.default_rng(seed)
  clean_R = forms.value(forms.SURFACE, theta, n=n_R, k=k_R)
  return clean_R * np.exp(noise * rng.standard_normal(clean_R.shape))


def cell(n_latents=1024, k=32, loss=0.3, seed=0, **fields):
  """A cell of which a test names what matters."""
  values = {
    'd_model': 64,
    'tokens': 1_000_000,
    'learning_rate': 1e-3,
    'learning_rate_factor': 1.0,
    'metric': 'nmse',
    'stop': 'tokens',
    'subject': 'small',
    'site': 'blocks.1.resid_post',
  }
  return Cell(
    n_latents=int(n_latents), k=int(k), loss=float(loss), seed=seed,
    **(values | fields),
  )  # fmt: skip


def table(theta, powers, ks, noise=0.0, seeds=1, **fields):
  """Cells of a grid, each with several seeds."""
  n_R, k_R = grid(powers, ks)
  return [
    cell(n, k, y, seed, **fields)
    for seed in range(seeds)
    for n, k, y in zip(n_R, k_R, losses(theta, n_R, k_R, noise, seed))
  ]
