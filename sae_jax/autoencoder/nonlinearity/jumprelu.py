"""A baseline: JumpReLU, trained with an L0 penalty.

Each latent has a threshold, whose gradient is an estimate (Rajamanoharan et
al. 2024).
"""

import jax
import jax.numpy as jnp

from sae_jax.autoencoder import encoder, nonlinearity
from sae_jax.autoencoder.params import Sae, SaeConfig

# Each latent's threshold as its logarithm, or as it is; a config has one.
_LOG, _VALUE = 'log_threshold_N', 'threshold_N'
TRAINED = (_LOG, _VALUE)
# Initial threshold, in units of the preprocessed tokens' RMS distance from
# their mean.
_FIRST_THRESHOLD = 1e-3

follow = nonlinearity.keep
active_per_token = nonlinearity.any_number


def extra(config: SaeConfig, dtype: jnp.dtype) -> dict[str, jax.Array]:
  """A threshold of 1 for every latent."""
  if config.jump_threshold == 'value':
    return {_VALUE: jnp.ones((config.n_latents,), dtype)}
  return {_LOG: jnp.zeros((config.n_latents,), dtype)}


def thresholds(extra: dict[str, jax.Array]) -> jax.Array:
  """Each latent's threshold; one below 0 is as good as 0."""
  if _VALUE in extra:
    return jnp.maximum(extra[_VALUE], 0)
  return jnp.exp(extra[_LOG])


def fit(
  config: SaeConfig,
  sae: Sae,
  x_BD: jax.Array,
  mse_of_mean: jax.Array,
  axis: str | None,
) -> dict[str, jax.Array]:
  """Thresholds that are small beside the tokens' distance from their mean."""
  del config, x_BD, axis
  first = _FIRST_THRESHOLD * jnp.sqrt(mse_of_mean)
  ((name, old_N),) = sae.extra.items()
  return {
    name: jnp.zeros_like(old_N) + (jnp.log(first) if name == _LOG else first)
  }


def codes(
  config: SaeConfig, sae: Sae, x_BD: jax.Array, axis: str | None
) -> tuple[jax.Array, jax.Array]:
  """JumpReLU of every latent's pre-activation."""
  del axis
  pre_BN = encoder.pre_activations(config, sae, x_BD)
  return encoder.dense_codes(jump_relu(pre_BN, thresholds(sae.extra)))


def jump_relu(pre_BN: jax.Array, threshold_N: jax.Array) -> jax.Array:
  """JumpReLU: the pre-activation where it exceeds its latent's threshold.

  Rajamanoharan et al. 2024, equation 4. It has no gradient with respect to the
  threshold: for that see `trainable_jump_relu`.
  """
  return jnp.where(pre_BN > threshold_N, pre_BN, 0)


def _near(pre_BN, threshold_N, bandwidth):
  """The rectangle kernel K((pre - threshold) / bandwidth) / bandwidth."""
  return (jnp.abs(pre_BN - threshold_N) < bandwidth / 2) / bandwidth


def _threshold_sum(terms_BN, like_N):
  axis = tuple(range(terms_BN.ndim - 1))
  return terms_BN.sum(axis).astype(like_N.dtype)


@jax.custom_vjp
def trainable_jump_relu(
  pre_BN: jax.Array, threshold_N: jax.Array, bandwidth: jax.Array
) -> jax.Array:
  """`jump_relu` with a straight-through estimate for the threshold.

  Its derivative with respect to the threshold is taken as
  -(threshold / bandwidth) K((pre - threshold) / bandwidth), K the rectangle
  (Rajamanoharan et al. 2024, equation 11); with respect to the pre-activation
  it is the true one, 1 above the threshold and 0 below.

  Args:
    pre_BN: pre-activations.
    threshold_N: each latent's threshold.
    bandwidth: width of the kernel, in units of the pre-activations.
  """
  del bandwidth
  return jump_relu(pre_BN, threshold_N)


def _jump_forward(pre_BN, threshold_N, bandwidth):
  saved = (pre_BN, threshold_N, bandwidth)
  return jump_relu(pre_BN, threshold_N), saved


def _jump_backward(saved, g_BN):
  pre_BN, threshold_N, bandwidth = saved
  slope_BN = -threshold_N * _near(pre_BN, threshold_N, bandwidth)
  return (
    jnp.where(pre_BN > threshold_N, g_BN, 0),
    _threshold_sum(g_BN * slope_BN, threshold_N),
    jnp.zeros_like(bandwidth),
  )


trainable_jump_relu.defvjp(_jump_forward, _jump_backward)


@jax.custom_vjp
def trainable_count(
  pre_BN: jax.Array, threshold_N: jax.Array, bandwidth: jax.Array
) -> jax.Array:
  """How many pre-activations exceed their threshold, all tokens together.

  The derivative with respect to the threshold is estimated as
  -K((pre - threshold) / bandwidth) / bandwidth (Rajamanoharan et al. 2024,
  equation 12); there is none with respect to the pre-activations.

  Args:
    pre_BN: pre-activations.
    threshold_N: each latent's threshold.
    bandwidth: width of the kernel, in units of the pre-activations.
  """
  del bandwidth
  # Two sums, since the pairs of a large batch may exceed an int32.
  open_B = (pre_BN > threshold_N).sum(-1)
  return open_B.astype(pre_BN.dtype).sum()


def _count_forward(pre_BN, threshold_N, bandwidth):
  count = trainable_count(pre_BN, threshold_N, bandwidth)
  return count, (pre_BN, threshold_N, bandwidth)


def _count_backward(saved, g):
  pre_BN, threshold_N, bandwidth = saved
  return (
    jnp.zeros_like(pre_BN),
    _threshold_sum(-g * _near(pre_BN, threshold_N, bandwidth), threshold_N),
    jnp.zeros_like(bandwidth),
  )


trainable_count.defvjp(_count_forward, _count_backward)
