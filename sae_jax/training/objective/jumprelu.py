"""The loss of the JumpReLU baseline: an L0 penalty."""

import jax
import jax.numpy as jnp

from sae_jax.autoencoder import Sae
from sae_jax.autoencoder.nonlinearity import jumprelu
from sae_jax.ops import varying
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
  """A pass whose penalty is the number of active latents."""
  del prepared, tally_N, candidates
  pre_BN = dense.pre_activations(setting, sae, x_BD)
  bandwidth = setting.config.jump_bandwidth * jnp.sqrt(setting.mse_of_mean)
  threshold_N = jumprelu.thresholds(sae.extra)
  jump = threshold_N, varying.match(bandwidth, pre_BN)
  return dense.sums(
    setting,
    sae,
    x_BD,
    jumprelu.trainable_jump_relu(pre_BN, *jump),
    jumprelu.trainable_count(pre_BN, *jump),
  )
