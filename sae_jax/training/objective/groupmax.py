"""The loss of group max: that of TopK, with the largest of each group."""

import jax
import jax.numpy as jnp

from sae_jax.autoencoder import Sae, SaeConfig
from sae_jax.autoencoder.nonlinearity import groupmax
from sae_jax.training.objective import dense, terms
from sae_jax.training.objective.config import ObjectiveConfig

AUXK = True
SPARSE = False
prepare = dense.prepare
fold = dense.fold
second_weight = dense.no_second


def check(sae_config: SaeConfig, config: ObjectiveConfig) -> None:
  """Raises UserError for a penalty, and for terms that only TopK has."""
  dense.check_no_penalty(sae_config, config)
  dense.check_topk_alone(sae_config, config)


def sums(
  setting: terms.Setting,
  sae: Sae,
  x_BD: jax.Array,
  prepared: None,
  tally_N: jax.Array,
  candidates: None,
) -> terms.Pass:
  """A pass in which the largest of each group are active."""
  del prepared, tally_N, candidates
  pre_BN = dense.pre_activations(setting, sae, x_BD)
  is_largest_BN = groupmax.largest(
    setting.sae_config, pre_BN, setting.shards.latent_axis
  )
  z_BN = jnp.where(is_largest_BN, jax.nn.relu(pre_BN), 0)
  return dense.sums(setting, sae, x_BD, z_BN)


def logged(
  sae_config: SaeConfig,
  config: ObjectiveConfig,
  implementation: str | None,
  values: terms.Terms,
) -> dict[str, jax.Array]:
  """Nothing beside what every step logs."""
  del sae_config, config, implementation, values
  return {}
