"""k latents a token on average, the largest of a batch (Bussmann et al. 2024).

"BatchTopK sparse autoencoders": in training the B k largest of all positive
pre-activations of a batch of B tokens are active. Whatever equals the smallest
of them is active too, so that neither order nor sharding matters. A single
token has no batch: it is encoded with a threshold, a moving average of the
smallest active value of the batches.
"""

import jax
import jax.numpy as jnp

from sae_jax import errors
from sae_jax.autoencoder import encoder, nonlinearity
from sae_jax.autoencoder.params import Sae, SaeConfig
from sae_jax.ops import varying

TRAINED = ()
# Decay of the threshold's moving average per step. The smallest of thousands of
# active values hardly varies from batch to batch: a hundred batches are enough,
# and a longer average would lag behind weights that still grow.
_DECAY = 0.99
_LIMB = 16

active_per_token = nonlinearity.any_number


def extra(config: SaeConfig, dtype: jnp.dtype) -> dict[str, jax.Array]:
  """A threshold of 0, which every positive pre-activation exceeds."""
  del config
  return {'threshold': jnp.zeros((), dtype)}


def fit(
  config: SaeConfig,
  sae: Sae,
  x_BD: jax.Array,
  mse_of_mean: jax.Array,
  axis: str | None,
) -> dict[str, jax.Array]:
  """The smallest active value of these tokens, taken as a batch."""
  del mse_of_mean
  pre_BN = encoder.pre_activations(config, sae, x_BD)
  axes = () if axis is None else (axis,)
  smallest = smallest_active(pre_BN, len(x_BD) * config.k, axes)
  return {'threshold': jnp.where(jnp.isfinite(smallest), smallest, 0)}


def follow(
  extra: dict[str, jax.Array], observed: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Moves the threshold towards the smallest active value of a batch."""
  old, smallest = extra['threshold'], observed['threshold']
  moved = old + (1 - _DECAY) * (smallest - old)
  # A batch without any active latent does not change it.
  return {'threshold': jnp.where(jnp.isfinite(smallest), moved, old)}


def codes(
  config: SaeConfig, sae: Sae, x_BD: jax.Array, axis: str | None
) -> tuple[jax.Array, jax.Array]:
  """Every latent's pre-activation where it exceeds the threshold."""
  del axis
  pre_BN = encoder.pre_activations(config, sae, x_BD)
  # Below 0 in checkpoints of others alone, where a ReLU comes first.
  threshold = jnp.maximum(sae.extra['threshold'], 0)
  z_BN = jnp.where(pre_BN > threshold, pre_BN, 0)
  return encoder.dense_codes(z_BN)


def smallest_active(
  pre_BN: jax.Array, n_active: int, axes: tuple[str, ...] = ()
) -> jax.Array:
  """The n_active-th largest of the positive pre-activations of a batch.

  Found exactly, by bisection on the bits: as integers positive floats are in
  the same order, and each bit of the result takes one count over the batch.

  Args:
    pre_BN: this device's pre-activations; a NaN is not counted.
    n_active: rank of the result, over the whole batch.
    axes: mesh axes over which the batch and latents are sharded, inside
      shard_map.

  Returns:
    The value; if fewer are positive, the smallest positive one; if none is,
    infinity. It is the same on all devices.

  Raises:
    UserError: if a device has 2^31 pre-activations or more.
  """
  if pre_BN.size >= 2**31:
    raise errors.UserError(
      f'batchtopk counts {pre_BN.shape[0]} tokens x {pre_BN.shape[1]} latents '
      f'on a device, {2**31 - 1} pairs at most: use a smaller batch or more '
      'devices'
    )
  bits = jnp.finfo(pre_BN.dtype).bits
  integer = jnp.dtype(f'int{bits}')

  def as_float(key):
    return jax.lax.bitcast_convert_type(key, pre_BN.dtype)

  def count(key):
    """How many are at least as large, in two limbs: it may pass an int32."""
    # Compared as floats, since an array of keys would be as large as the
    # pre-activations. A comparison with NaN, on either side, is false.
    large_BN = (pre_BN > 0) & (pre_BN >= as_float(key))
    own = large_BN.sum(dtype=jnp.int32)
    limbs = own >> _LIMB, own % 2**_LIMB
    high, low = jax.lax.psum(limbs, axes) if axes else limbs
    return high + (low >> _LIMB), low % 2**_LIMB

  def at_least(a, b):
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))

  positive = count(jnp.zeros((), integer))
  rank = n_active >> _LIMB, n_active % 2**_LIMB
  enough = at_least(positive, rank)
  rank = tuple(jnp.where(enough, r, p) for r, p in zip(rank, positive))

  def set_bit(i, key):
    # Below the sign, from the highest bit on.
    higher = key | (jnp.ones((), integer) << (bits - 2 - i).astype(integer))
    return jnp.where(at_least(count(higher), rank), higher, key)

  zero = varying.zeros((), integer, *positive)
  key = jax.lax.fori_loop(0, bits - 1, set_bit, zero)
  fires = (positive[0] > 0) | (positive[1] > 0)
  return jnp.where(fires, as_float(key), jnp.inf)
