"""A run whose sizes kernels take."""

import dataclasses

import numpy as np

from sae_jax.training.objective import ObjectiveConfig
from sae_jax.training.optimizer import OptimizerConfig
from tests.support import planted

STEPS = 10


def rows():
  """Planted features in 128 dimensions, which kernels can take."""
  planted_BD = planted.activations(STEPS * 32 + 500)
  mix_DE = np.random.default_rng(0).standard_normal((planted_BD.shape[1], 128))
  return (planted_BD @ mix_DE).astype(np.float32)


def config():
  """AuxK and clipping take part, and latents die at the third step."""
  made = planted.train_config(steps=STEPS)
  return dataclasses.replace(
    made,
    sae=dataclasses.replace(made.sae, d_model=128, n_latents=256, k=5),
    objective=ObjectiveConfig(k_aux=12, dead_after_tokens=2 * 32),
    optimizer=OptimizerConfig(learning_rate=1e-3, clip_norm=0.25),
    batch_size=32,
  )
