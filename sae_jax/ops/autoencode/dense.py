"""`autoencode` by dense products, where N / K is small."""

import jax
import jax.numpy as jnp

from sae_jax.ops import scopes, varying
from sae_jax.ops.autoencode import tally
from sae_jax.ops.autoencode.coded import Coded, How, plain
from sae_jax.ops.dense import matmul
from sae_jax.ops.encode_topk import reference
from sae_jax.ops.top_k import api as top_k_api


def autoencode(
  how: How, x_BD, w_enc_ND, b_lat_N, w_dec_ND, b_pre_D, mask_N, tally_N
) -> Coded:
  """See `autoencode.api`; differentiated by jax itself.

  A token's winners are the latents that do not come after the last winner in
  the order of the top k. So codes are pre-activations under a mask: to scatter
  them a TPU would sort all pairs.
  """
  stop = jax.lax.stop_gradient
  fixed_D = stop(b_pre_D)
  # Zero in value: it only gives b_pre its gradient, without a pass over the
  # tokens.
  shift_N = matmul(stop(w_enc_ND), b_pre_D)
  centred_BD, bias_N = x_BD - fixed_D, b_lat_N - (shift_N - stop(shift_N))
  with jax.named_scope(scopes.ENCODER):
    pre_BN = reference.pre_activations(centred_BD, w_enc_ND, bias_N, how.dtype)
  if mask_N is not None:
    pre_BN = jnp.where(mask_N, pre_BN, -jnp.inf)
  n_latents = pre_BN.shape[1]
  offered_BK, idx_BK = top_k_api.top_k(
    stop(pre_BN), min(how.ks[-1], n_latents), kernels=True
  )
  codes, models, first_BN = [], [], None
  for k in how.ks:
    won_B = top_k_api.winners(offered_BK[:, :k], how.axis, k, kernels=True)
    won_BK = jnp.arange(min(k, n_latents)) < won_B[:, None]
    codes.append(jnp.where(won_BK, jax.nn.relu(offered_BK[:, :k]), 0))
    z_BN = jnp.where(
      _won(stop(pre_BN), offered_BK, idx_BK, won_B), jax.nn.relu(pre_BN), 0
    )
    first_BN = z_BN if first_BN is None else first_BN
    models.append(matmul(z_BN, w_dec_ND, how.dtype))
  models = tuple(models)
  if tally_N is not None:
    used_N = stop(first_BN).sum(0).astype(tally_N.dtype)
    models = tally.counted(models, used_N, varying.match(tally_N, used_N))
  vals_BK = codes[0]
  return plain(x_BD, vals_BK, idx_BK[:, : vals_BK.shape[1]], models)


def _won(pre_BN, offered_BK, idx_BK, won_B):
  """Which latents are not after a token's last winner.

  "Not after" rather than "before", so that a NaN, which no comparison puts
  after anything, wins.
  """
  last_B1 = jnp.maximum(won_B - 1, 0)[:, None]
  value_B1 = jnp.take_along_axis(offered_BK, last_B1, axis=1)
  idx_B1 = jnp.take_along_axis(idx_BK, last_B1, axis=1)
  later_BN = jnp.arange(pre_BN.shape[1]) > idx_B1
  after_BN = (pre_BN < value_B1) | ((pre_BN == value_B1) & later_BN)
  return ~after_BN & (won_B > 0)[:, None]
