"""The loss of the ReLU baseline: an L1 penalty."""

import jax
import jax.numpy as jnp

from sae_jax.autoencoder import Sae
from sae_jax.training.objective import dense, terms

AUXK = False
SPARSE = False
check = dense.check_topk_alone
prepare = dense.prepare
fold = dense.fold
second_weight = dense.no_second
logged = dense.penalty_logged


def sums(
  setting: terms.Setting,
  sae: Sae,
  x_BD: jax.Array,
  prepared: None,
  tally_N: jax.Array,
  candidates: None,
) -> terms.Pass:
  """A pass whose penalty is the sum of z, in units of the tokens' distance."""
  del prepared, tally_N, candidates
  z_BN = jax.nn.relu(dense.pre_activations(setting, sae, x_BD))
  # Decoder rows have unit norm, so larger rows cannot lower the L1 norm.
  penalty = z_BN.sum() / jnp.sqrt(setting.mse_of_mean)
  return dense.sums(setting, sae, x_BD, z_BN, penalty)
