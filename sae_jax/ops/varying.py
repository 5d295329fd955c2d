"""Arrays that start a loop or a kernel inside `jax.shard_map`."""

import jax
import jax.numpy as jnp

# jax 0.7.2, which Colab has, has other names for the same.
_IS_OLD = not hasattr(jax.lax, 'pcast')


def axes(*like: jax.Array) -> frozenset[str]:
  """The mesh axes that any of the arrays varies over."""
  kinds = map(jax.typeof, like)
  return frozenset().union(
    *(k.vma if _IS_OLD else k.manual_axis_type.varying for k in kinds)
  )


def mark(array: jax.Array, names: str | tuple[str, ...]) -> jax.Array:
  """Marks `array`, equal on all shards of mesh axes, as varying over them."""
  if _IS_OLD:
    return jax.lax.pvary(array, names)
  return jax.lax.pcast(array, names, to='varying')


def match(array: jax.Array, *like: jax.Array) -> jax.Array:
  """Marks `array` as varying over every mesh axis that any of `like` is.

  Outside of shard_map this is the identity. Its transpose is a sum over the
  axes, which is what turns per-shard weight gradients into global ones.
  """
  missing = tuple(sorted(axes(*like) - axes(array)))
  return mark(array, missing) if missing else array


def zeros(shape, dtype, *like: jax.Array) -> jax.Array:
  """Zeros that vary over the mesh axes of `like`."""
  return match(jnp.zeros(shape, dtype), *like)


def shape(shape, dtype, *like: jax.Array) -> jax.ShapeDtypeStruct:
  """The shape of a kernel's result that varies over the mesh axes of `like`."""
  if _IS_OLD:
    return jax.ShapeDtypeStruct(shape, dtype, vma=axes(*like))
  axis_type = jax.typeof(next(iter(like))).manual_axis_type
  return jax.ShapeDtypeStruct(
    shape, dtype, manual_axis_type=type(axis_type)(varying=axes(*like))
  )
