"""The terms of a loss, and the sums over tokens that they follow from."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from sae_jax.autoencoder import SaeConfig
from sae_jax.ops import Diagnostics, varying
from sae_jax.training.objective.config import ObjectiveConfig
from sae_jax.training.shards import Shards


@flax.struct.dataclass
class Terms:
  """Terms of the loss and counts, of the whole batch.

  Attributes:
    nmse: mean squared error over the mean predictor's, which is a constant.
    aux: AuxK's normalised error, 0 where no latent is dead.
    multi: NMSE of the second reconstruction, 0 without one: of the wider code
      of Multi-TopK, or of gates alone.
    penalty: the baselines' L1 or L0 per token, 0 for others.
    l0: mean number of active latents per token.
    fired_N: whether a latent was active for any token of the batch.
    diagnostics: of the search for the top k, per token, a mean over the shards
      of the latents.
    observed: values that the nonlinearity's untrained parameters follow.
  """

  nmse: jax.Array
  aux: jax.Array
  multi: jax.Array
  penalty: jax.Array
  l0: jax.Array
  fired_N: jax.Array
  diagnostics: Diagnostics
  observed: dict[str, jax.Array]


@flax.struct.dataclass
class Sums:
  """Sums over this device's tokens, of its latents in `active` and `fired_N`.

  Attributes:
    error: of squared errors.
    multi: of squared errors of the second reconstruction.
    penalty: of the baselines' penalty, over all shards of the latents.
    active: of active latents.
    fired_N: above 0 for latents that were active. TopK leaves it to the
      gradient of its tally, see `ops.autoencode`.
  """

  error: jax.Array
  multi: jax.Array
  penalty: jax.Array
  active: jax.Array
  fired_N: jax.Array

  @classmethod
  def zeros(cls, x_BD: jax.Array, dead_N: jax.Array) -> 'Sums':
    """The sums of no tokens, to start from."""
    zero = varying.zeros((), x_BD.dtype, x_BD)
    fired_N = varying.zeros(dead_N.shape, jnp.int32, dead_N, x_BD)
    active = varying.match(zero, fired_N)
    return cls(zero, zero, zero, active, fired_N)


@flax.struct.dataclass
class Pass:
  """Results of a pass over some tokens.

  Attributes:
    sums: sums over the tokens; micro-batches' sums are added up.
    diagnostics: of the search for the top k, added up likewise.
    error_BD: x - x^ of each token.
    observed: values of the whole batch for the nonlinearity's untrained
      parameters, arrays [1].
    exhausted: whether candidates were too few, see `ops.with_few_candidates`.
  """

  sums: Sums
  diagnostics: Diagnostics
  error_BD: jax.Array
  observed: dict[str, jax.Array]
  exhausted: jax.Array


@dataclasses.dataclass(frozen=True)
class Setting:
  """Everything a loss depends on beside parameters and tokens.

  Attributes:
    sae_config: the autoencoder's config.
    config: the terms.
    shards: where the tokens and latents are.
    tokens: number of tokens of the whole batch, on all devices.
    mse_of_mean: squared error of the mean predictor per token, a constant.
    implementation: of the sparse products, see `ops.decode`.
  """

  sae_config: SaeConfig
  config: ObjectiveConfig
  shards: Shards
  tokens: int
  mse_of_mean: jax.Array
  implementation: str | None = None


def count(active_BK: jax.Array) -> jax.Array:
  """The number of true values as a float: a large batch's may pass an int32."""
  return active_BK.sum(-1).astype(jnp.result_type(float)).sum()
