"""The loss of BatchTopK: that of TopK, with k latents a token on average."""

import jax
import jax.numpy as jnp

from sae_jax.autoencoder import Sae, SaeConfig
from sae_jax.autoencoder.nonlinearity import batchtopk
from sae_jax.training.objective import dense, terms
from sae_jax.training.objective.config import ObjectiveConfig

AUXK = True
SPARSE = False
fold = dense.fold
second_weight = dense.no_second


def check(sae_config: SaeConfig, config: ObjectiveConfig) -> None:
  """Raises UserError for a penalty, and for terms that only TopK has."""
  dense.check_no_penalty(sae_config, config)
  dense.check_topk_alone(sae_config, config)


def _smallest_active(setting: terms.Setting, pre_BN: jax.Array) -> jax.Array:
  shards = setting.shards
  axes = tuple(a for a in (shards.data_axis, shards.latent_axis) if a)
  n_active = setting.tokens * setting.sae_config.k
  return batchtopk.smallest_active(
    jax.lax.stop_gradient(pre_BN), n_active, axes
  )


def prepare(
  setting: terms.Setting, sae: Sae, x_BD: jax.Array
) -> jax.Array | None:
  """The smallest active value of the whole batch.

  With one micro-batch it is None: `sums` sees the whole batch and finds it.
  With several, a pass without gradients comes first. It holds the
  pre-activations of all of this device's tokens at once, 4 bytes for each of
  its tokens and latents; the gradient's arrays are only those of a micro-batch.
  """
  if setting.shards.micro_batches == 1:
    return None

  # By micro-batches too: products of other shapes may round differently, and
  # then the smallest active value might not be active.
  def run(x_BD):
    return (), dense.pre_activations(setting, sae, x_BD)

  _, pre_BN = setting.shards.fold(run, (), x_BD)
  return _smallest_active(setting, pre_BN)


def sums(
  setting: terms.Setting,
  sae: Sae,
  x_BD: jax.Array,
  prepared: jax.Array | None,
  tally_N: jax.Array,
  candidates: None,
) -> terms.Pass:
  """A pass whose codes are not below the batch's smallest active value."""
  del tally_N, candidates
  pre_BN = dense.pre_activations(setting, sae, x_BD)
  smallest = prepared
  if smallest is None:
    smallest = _smallest_active(setting, pre_BN)
  # Compared with `<`, which is false for NaN, so that a NaN stays and shows in
  # the loss.
  z_BN = jnp.where(pre_BN < smallest, 0, pre_BN)
  observed = {'threshold': smallest[None]}
  return dense.sums(setting, sae, x_BD, z_BN, observed=observed)


def logged(
  sae_config: SaeConfig,
  config: ObjectiveConfig,
  implementation: str | None,
  values: terms.Terms,
) -> dict[str, jax.Array]:
  """The smallest active value, which the threshold follows."""
  del sae_config, config, implementation
  return dict(values.observed)
