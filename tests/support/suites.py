"""A context of the suite over the small subject of `probed`."""

import jax
import numpy as np

from sae_jax import autoencoder
from sae_jax import mesh as mesh_lib
from sae_jax.probing import baselines, reconstruction
from sae_jax.probing.suite import context as context_lib
from sae_jax.probing.suite import controls
from sae_jax.probing.suite import scored as scored_lib
from tests.support import probed

K = 4


def write_store(url):
  """A store with many test documents of contexts of four tokens or more."""
  rng = np.random.default_rng(5)
  lengths = tuple(
    tuple(rng.integers(4, 13, rng.integers(1, 4)).tolist()) for _ in range(60)
  )
  return probed.write_store(url, lengths, 30)


def fitted(trained, data):
  """Mean and scatter of preprocessed training rows."""
  raw_BD = data.read_rows(0, data.n_train)
  x_BD, _ = autoencoder.preprocess(trained.config, trained.sae, raw_BD)
  state = baselines.empty_state(trained.config.d_model)
  return baselines.accumulate(state, np.asarray(x_BD))


def everything(trained, data, mesh):
  """The autoencoder and the controls that every suite has, by name."""
  sample_BD = data.read_rows(0, data.n_train)
  state = fitted(trained, data)
  return {
    'trained': trained,
    'untrained': reconstruction.untrained(trained.config, sample_BD, 1, mesh),
    controls.PCA: controls.components(trained, state, K, mesh),
    controls.CHANNELS: controls.channels(trained, state, K, mesh),
  }


def context(trained, data, mesh=None, scored=None, **changes):
  """A context of them, or of those that are given."""
  mesh = mesh or mesh_lib.one_device()
  scored = scored or everything(trained, data, mesh)
  n_latents = trained.config.n_latents
  values = {
    'scored': {
      name: scored_lib.of(of, mesh, n_latents) for name, of in scored.items()
    },
    'subject': probed.make_subject(),
    'store': data,
    'mesh': mesh,
    'mean_D': data.read_rows(0, data.n_train).mean(0),
    'seed': 0,
    'size': 'quick',
    'counts_N': np.full(n_latents, 9),
    'max_N': np.linspace(0.5, 2, n_latents, dtype=np.float32),
  }
  return context_lib.Context(**values | changes)


def shrink(monkeypatch, evaluation, **sizes):
  """Makes an evaluation measure as much as is given, in the quick size."""
  kind = type(evaluation.SIZES['quick'])
  monkeypatch.setitem(evaluation.SIZES, 'quick', kind(**sizes))


def wide(tree):
  """Arrays in float64."""
  return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)
