"""A TopK autoencoder and its objective written densely, for comparison."""

import jax
import jax.numpy as jnp


def codes(pre_BN, k):
  """TopK as a dense row: stable sort, the k first, ReLU."""
  order_BN = jnp.argsort(-pre_BN, axis=1, stable=True)
  rank_BN = jnp.argsort(order_BN, axis=1)
  return jnp.where(rank_BN < k, jax.nn.relu(pre_BN), 0)


def loss(sae, x_BD, dead_N, mse_of_mean, k, k_aux, aux_weight):
  """The whole objective with plain autodiff; returns (loss, (nmse, aux))."""
  pre_BN = (x_BD - sae.b_pre_D) @ sae.w_enc_ND.T + sae.b_lat_N
  output_BD = codes(pre_BN, k) @ sae.w_dec_ND + sae.b_pre_D
  nmse = ((x_BD - output_BD) ** 2).sum(1).mean() / mse_of_mean
  error_BD = jax.lax.stop_gradient(x_BD - output_BD)
  fixed_BD = jax.lax.stop_gradient(x_BD - sae.b_pre_D)
  pre_BN = fixed_BD @ sae.w_enc_ND.T + sae.b_lat_N
  dead_BN = codes(jnp.where(dead_N, pre_BN, -1e30), k_aux)
  missed = ((error_BD - dead_BN @ sae.w_dec_ND) ** 2).sum()
  aux = jnp.where(dead_N.any(), missed / (error_BD**2).sum(), 0)
  return nmse + aux_weight * aux, (nmse, aux)
