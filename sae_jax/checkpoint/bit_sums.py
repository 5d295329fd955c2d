"""A fingerprint of arrays, computed where they lie."""

import functools
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# A multiplier for each of the 32-bit sums of an array, which differ in nothing
# else. They are digits of pi, made odd.
_LANES = (0x243F6A89, 0x85A308D3, 0x13198A2F, 0x03707345)
# Elements that are mixed at a time, in 16 bytes of memory each.
_BLOCK = 2**18


def fingerprint(tree: Any) -> str:
  """A digest of arrays: of their names, dtypes, shapes and all their bits.

  It is the same however the arrays are sharded, and on every process of a
  mesh, all of which must call it. No array is copied to the host: from each
  come four sums modulo 2^32, in which the bits and the place of each element
  are mixed. It tells arrays apart that differ by accident, not those that
  somebody made to collide.

  Args:
    tree: a pytree of jax arrays, such as an `autoencoder.Sae`.

  Returns:
    64 hexadecimal digits.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  # All are begun before any is waited for.
  begun = [_begin(array) for _, array in leaves]
  digest = hashlib.sha256()
  for (path, array), sums in zip(leaves, begun):
    name = jax.tree_util.keystr(path)
    sums = np.asarray(sums).tolist()
    digest.update(f'{name} {array.dtype} {array.shape} {sums}\n'.encode())
  return digest.hexdigest()


def _begin(array: jax.Array) -> jax.Array:
  """The sums of an array, on all devices that have it."""
  if isinstance(array.sharding, jax.sharding.NamedSharding):
    return _sums_of_shards(array, array.sharding.mesh, array.sharding.spec)
  return _sums(array, [jnp.uint32(0)] * array.ndim)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _sums_of_shards(array, mesh, spec) -> jax.Array:
  # A mesh axis, several or none for each axis of the array.
  split = [axes or () for axes in (*spec, *[None] * array.ndim)]

  def total(part):
    first = [
      jax.lax.axis_index(axes).astype(jnp.uint32) * size if axes else 0
      for axes, size in zip(split, part.shape)
    ]
    sums = _sums(part, [jnp.uint32(place) for place in first])
    for axes in split:
      sums = jax.lax.psum(sums, axes) if axes else sums
    return sums

  out = jax.sharding.PartitionSpec()
  # A loop's variables must else be marked as different on each device.
  return jax.shard_map(
    total, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False
  )(array)


@jax.jit
def _sums(part: jax.Array, first: list[jax.Array]) -> jax.Array:
  """A sum for each lane over a part of an array, uint32.

  Args:
    part: the part.
    first: its first place along each axis of the array.
  """
  zeros = jnp.zeros(len(_LANES), jnp.uint32)
  if not part.size:
    return zeros
  if not part.ndim:
    part, first = part[None], [jnp.uint32(0)]
  n_rows = part.shape[0]
  rows = max(1, min(n_rows, _BLOCK // math.prod(part.shape[1:])))

  def add(block, sums):
    # The last block begins where as many rows are left.
    begin = jnp.minimum(block * rows, n_rows - rows)
    words = _words(jax.lax.dynamic_slice_in_dim(part, begin, rows))
    starts = [first[0] + begin.astype(jnp.uint32), *first[1:]]
    is_new = begin + jnp.arange(rows) >= block * rows
    is_new = is_new.reshape(-1, *(1,) * (words.ndim - 1))
    return sums + jnp.stack(
      [
        jnp.where(is_new, _mixed(words, starts, lane), 0).sum(dtype=jnp.uint32)
        for lane in _LANES
      ]
    )

  return jax.lax.fori_loop(0, -(-n_rows // rows), add, zeros)


def _words(array: jax.Array) -> jax.Array:
  """The bits of elements as uint32; of longer ones along a new last axis."""
  if array.dtype == bool:
    array = array.astype(jnp.uint8)
  bits = jnp.dtype(f'uint{8 * min(4, array.dtype.itemsize)}')
  return jax.lax.bitcast_convert_type(array, bits).astype(jnp.uint32)


def _mixed(words: jax.Array, starts: list[jax.Array], lane: int) -> jax.Array:
  """The bits of each element, mixed with its place along each axis."""
  place = jnp.uint32(lane)
  # An axis at a time, as numbers of elements pass 32 bits.
  for axis in range(words.ndim):
    along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    along = along + (starts[axis] if axis < len(starts) else 0)
    place = _mix(place ^ (along * jnp.uint32(lane)))
  return _mix(place ^ words)


def _mix(x: jax.Array) -> jax.Array:
  """A bijection of 32-bit words that spreads each bit over all.

  It is lowbias32, from https://github.com/skeeto/hash-prospector.
  """
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)
