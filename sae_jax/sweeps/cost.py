"""Floating-point operations of a run, as it does them and as a dense one would.

A multiplication and an addition are two.
"""

from sae_jax.training import defaults
from sae_jax.training.config import TrainConfig


def spent(config: TrainConfig) -> float:
  """Operations of all steps of a run with sparse products.

  A token's pre-activations take 2 n d, and each of the k active latents 8 d:
  its share of the reconstruction, the gradient of its value, and those of its
  rows of the encoder and of the decoder. What AuxK adds, which depends on how
  many latents are dead, Adam and selection are left out.

  Args:
    config: the run, with its d_model.
  """
  n_latents, k, d_model = _sizes(config)
  return (2 * n_latents + 8 * k) * d_model * float(defaults.tokens(config))


def dense_equivalent(config: TrainConfig) -> float:
  """6 n d operations a token: as many as a training step with dense codes.

  It is what the paper's compute is in (Gao et al. 2024, section 3).

  Args:
    config: the run, with its d_model.
  """
  n_latents, _, d_model = _sizes(config)
  return 6 * n_latents * d_model * float(defaults.tokens(config))


def _sizes(config):
  return config.sae.n_latents, config.sae.k, config.sae.d_model
