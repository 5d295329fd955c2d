"""Arrays that start a loop inside `jax.shard_map`."""

import jax
import jax.numpy as jnp


def match(array: jax.Array, *like: jax.Array) -> jax.Array:
  """Marks `array` as varying over every mesh axis that any of `like` is.

  Outside of shard_map this is the identity. Its transpose is a sum over the
  axes, which is what turns per-shard weight gradients into global ones.
  """
  own = jax.typeof(array).manual_axis_type.varying
  wanted = frozenset().union(
    *(jax.typeof(a).manual_axis_type.varying for a in like)
  )
  missing = tuple(sorted(wanted - own))
  return jax.lax.pcast(array, missing, to='varying') if missing else array


def zeros(shape, dtype, *like: jax.Array) -> jax.Array:
  """Zeros that vary over the mesh axes of `like`."""
  return match(jnp.zeros(shape, dtype), *like)
