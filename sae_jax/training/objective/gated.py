"""The loss of the gated baseline: an L1 penalty on the gates alone.

Beside it the gates must reconstruct by themselves, with a decoder that is held,
or nothing would teach them (Rajamanoharan et al. 2024, equation 8).
"""

import jax
import jax.numpy as jnp

from sae_jax.autoencoder import Sae, SaeConfig
from sae_jax.autoencoder.nonlinearity import gated
from sae_jax.training.objective import dense, terms
from sae_jax.training.objective.config import ObjectiveConfig

AUXK = False
SPARSE = False
check = dense.check_topk_alone
prepare = dense.prepare
fold = dense.fold


def second_weight(config: ObjectiveConfig) -> float:
  """1: the gates' own reconstruction counts as much as the other."""
  del config
  return 1.0


def sums(
  setting: terms.Setting,
  sae: Sae,
  x_BD: jax.Array,
  prepared: None,
  tally_N: jax.Array,
  candidates: None,
) -> terms.Pass:
  """A pass whose penalty is the sum of open gates, in the tokens' distance."""
  del prepared, tally_N, candidates
  product_BN = dense.products(setting, sae, x_BD)
  gate_BN, magnitude_BN = gated.gates(sae, product_BN)
  open_BN = jax.nn.relu(gate_BN)
  return dense.sums(
    setting,
    sae,
    x_BD,
    jnp.where(gate_BN > 0, jax.nn.relu(magnitude_BN), 0),
    penalty=open_BN.sum() / jnp.sqrt(setting.mse_of_mean),
    second_BN=open_BN,
  )


def logged(
  sae_config: SaeConfig,
  config: ObjectiveConfig,
  implementation: str | None,
  values: terms.Terms,
) -> dict[str, jax.Array]:
  """The penalty, and the NMSE of what the gates reconstruct by themselves."""
  del sae_config, config, implementation
  return {'penalty': values.penalty, 'gates': values.multi}
