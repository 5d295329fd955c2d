"""Arrays that start a loop or a kernel inside `jax.shard_map`."""

import jax
import jax.numpy as jnp


def axes(*like: jax.Array) -> frozenset[str]:
  """The mesh axes that any of the arrays varies over."""
  return frozenset().union(
    *(jax.typeof(a).manual_axis_type.varying for a in like)
  )


def match(array: jax.Array, *like: jax.Array) -> jax.Array:
  """Marks `array` as varying over every mesh axis that any of `like` is.

  Outside of shard_map this is the identity. Its transpose is a sum over the
  axes, which is what turns per-shard weight gradients into global ones.
  """
  missing = tuple(sorted(axes(*like) - axes(array)))
  return jax.lax.pcast(array, missing, to='varying') if missing else array


def zeros(shape, dtype, *like: jax.Array) -> jax.Array:
  """Zeros that vary over the mesh axes of `like`."""
  return match(jnp.zeros(shape, dtype), *like)


def shape(shape, dtype, *like: jax.Array) -> jax.ShapeDtypeStruct:
  """The shape of a kernel's result that varies over the mesh axes of `like`."""
  axis_type = jax.typeof(next(iter(like))).manual_axis_type
  return jax.ShapeDtypeStruct(
    shape, dtype, manual_axis_type=type(axis_type)(varying=axes(*like))
  )
