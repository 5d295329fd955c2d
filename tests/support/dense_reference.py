"""An autoencoder and its objective written densely, for comparison."""

import jax
import jax.numpy as jnp


def topk_codes(pre_BN, k):
  """TopK as a dense row: stable sort, the k first, ReLU."""
  order_BN = jnp.argsort(-pre_BN, axis=1, stable=True)
  rank_BN = jnp.argsort(order_BN, axis=1)
  return jnp.where(rank_BN < k, jax.nn.relu(pre_BN), 0)


def batch_codes(pre_BN, k):
  """BatchTopK as a dense array: a sort of all pre-activations of the batch."""
  smallest = jnp.sort(pre_BN.reshape(-1))[-k * len(pre_BN)]
  return jnp.where(pre_BN >= smallest, jax.nn.relu(pre_BN), 0)


def loss(
  sae,
  x_BD,
  dead_N,
  mse_of_mean,
  k,
  k_aux,
  aux_weight,
  wide=0,
  wide_weight=0.0,
  codes=topk_codes,
):
  """The whole objective with plain autodiff; returns (loss, (nmse, aux))."""
  pre_BN = (x_BD - sae.b_pre_D) @ sae.w_enc_ND.T + sae.b_lat_N
  output_BD = codes(pre_BN, k) @ sae.w_dec_ND + sae.b_pre_D
  nmse = ((x_BD - output_BD) ** 2).sum(1).mean() / mse_of_mean
  error_BD = jax.lax.stop_gradient(x_BD - output_BD)
  fixed_BD = jax.lax.stop_gradient(x_BD - sae.b_pre_D)
  dead_BN = fixed_BD @ sae.w_enc_ND.T + sae.b_lat_N
  dead_BN = topk_codes(jnp.where(dead_N, dead_BN, -1e30), k_aux)
  missed = ((error_BD - dead_BN @ sae.w_dec_ND) ** 2).sum()
  aux = jnp.where(dead_N.any(), missed / (error_BD**2).sum(), 0)
  total = nmse + aux_weight * aux
  if wide:
    output_BD = codes(pre_BN, wide) @ sae.w_dec_ND + sae.b_pre_D
    multi = ((x_BD - output_BD) ** 2).sum(1).mean() / mse_of_mean
    total += wide_weight * multi
  return total, (nmse, aux)


def _bias(config, sae):
  tied = config.pre_bias == 'tied' and not config.target_site
  return sae.b_pre_D if tied else 0


def codes_of(config, sae, x_BD):
  """The codes of any nonlinearity but BatchTopK, [B, N]."""
  bias_D = _bias(config, sae)
  product_BN = (x_BD - bias_D) @ sae.w_enc_ND.T
  pre_BN = product_BN + sae.b_lat_N
  if config.activation == 'topk':
    return topk_codes(pre_BN, config.k)
  if config.activation == 'groupmax':
    pre_BGM = pre_BN.reshape(len(pre_BN), config.k, -1)
    best_BG1 = pre_BGM.argmax(-1, keepdims=True)
    is_best_BGM = jnp.arange(pre_BGM.shape[-1]) == best_BG1
    pre_BN = jnp.where(is_best_BGM, pre_BGM, 0).reshape(pre_BN.shape)
  if config.activation == 'gated':
    magnitude_BN = product_BN * jnp.exp(sae.extra['r_mag_N'])
    magnitude_BN += sae.extra['b_mag_N']
    return jnp.where(pre_BN > 0, jax.nn.relu(magnitude_BN), 0)
  return jax.nn.relu(pre_BN)


def loss_of(config, sae, x_BD, dead_N, mse_of_mean, weight, k_aux):
  """The loss of a config, AuxK at 1 / 32 and penalties, by plain autodiff.

  Rows of a transcoder are followed by what they are to become.
  """
  x_BD, target_BD = x_BD[:, : config.d_model], x_BD[:, -config.d_model :]
  if config.skip:
    target_BD = target_BD - x_BD @ sae.target['w_skip_DD']
  output_BD = codes_of(config, sae, x_BD) @ sae.w_dec_ND + sae.b_pre_D
  total = ((target_BD - output_BD) ** 2).sum(1).mean() / mse_of_mean
  bias_D = _bias(config, sae)
  gate_BN = (x_BD - bias_D) @ sae.w_enc_ND.T + sae.b_lat_N
  if config.activation in ('relu', 'gated'):
    penalty = jax.nn.relu(gate_BN).sum(1).mean() / mse_of_mean**0.5
    total += weight * penalty
  if config.activation == 'gated':
    held_ND, held_D = map(jax.lax.stop_gradient, (sae.w_dec_ND, sae.b_pre_D))
    missed_BD = target_BD - jax.nn.relu(gate_BN) @ held_ND - held_D
    total += (missed_BD**2).sum(1).mean() / mse_of_mean
  if config.activation in ('topk', 'groupmax'):
    error_BD = jax.lax.stop_gradient(target_BD - output_BD)
    dead_BN = jax.lax.stop_gradient(x_BD - bias_D) @ sae.w_enc_ND.T
    dead_BN = jnp.where(dead_N, dead_BN + sae.b_lat_N, -1e30)
    missed_BD = error_BD - topk_codes(dead_BN, k_aux) @ sae.w_dec_ND
    total += (missed_BD**2).sum() / (error_BD**2).sum() / 32
  return total


def relu_loss(sae, x_BD, mse_of_mean, weight):
  """The ReLU baseline: NMSE and L1 in units of the RMS distance."""
  z_BN = jax.nn.relu((x_BD - sae.b_pre_D) @ sae.w_enc_ND.T + sae.b_lat_N)
  output_BD = z_BN @ sae.w_dec_ND + sae.b_pre_D
  nmse = ((x_BD - output_BD) ** 2).sum(1).mean() / mse_of_mean
  return nmse + weight * z_BN.sum(1).mean() / mse_of_mean**0.5


def jump_gradients(sae, x_BD, mse_of_mean, weight, bandwidth):
  """JumpReLU's loss and gradients, by hand, latent by latent.

  From the estimates of Rajamanoharan et al. 2024, equations 11 and 12, with
  the logarithm of the threshold as the parameter.
  """
  tokens = x_BD.shape[0]
  inputs_BD = x_BD - sae.b_pre_D
  pre_BN = inputs_BD @ sae.w_enc_ND.T + sae.b_lat_N
  threshold_N = jnp.exp(sae.extra['log_threshold_N'])
  open_BN = pre_BN > threshold_N
  z_BN = pre_BN * open_BN
  missed_BD = z_BN @ sae.w_dec_ND + sae.b_pre_D - x_BD
  value = (missed_BD**2).sum() / tokens / mse_of_mean
  value += weight * open_BN.sum() / tokens
  out_BD = 2 * missed_BD / tokens / mse_of_mean
  z_grad_BN = out_BD @ sae.w_dec_ND.T
  pre_grad_BN = z_grad_BN * open_BN
  near_BN = abs((pre_BN - threshold_N) / bandwidth) < 0.5
  by_threshold_BN = (
    -(z_grad_BN * threshold_N / bandwidth + weight / tokens / bandwidth)
    * near_BN
  )
  grads = {
    'w_enc_ND': pre_grad_BN.T @ inputs_BD,
    'w_dec_ND': z_BN.T @ out_BD,
    'b_lat_N': pre_grad_BN.sum(0),
    'b_pre_D': out_BD.sum(0) - pre_grad_BN.sum(0) @ sae.w_enc_ND,
    'log_threshold_N': by_threshold_BN.sum(0) * threshold_N,
  }
  return value, grads
