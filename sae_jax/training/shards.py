"""How a batch is split: over the devices, and in time."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax.ops import varying


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _psum(axis, x):
  """A sum over an axis whose shards go on with the same computation.

  So each shard's cotangent is the whole one already. shard_map's types would
  tell autodiff so, but an interpreted kernel has to do without them.
  """
  return jax.lax.psum(x, axis)


def _psum_backward(axis, _, cotangent):
  varies = functools.partial(jax.lax.pcast, axis_name=axis, to='varying')
  return (jax.tree.map(varies, cotangent),)


_psum.defvjp(lambda axis, x: (_psum(axis, x), None), _psum_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fan_out(axis, x):
  """An array that all shards of an axis have, where they begin to differ.

  Its cotangents do too, and are summed: the counterpart of `_psum`.
  """
  return jax.lax.pcast(x, axis, to='varying')


_fan_out.defvjp(
  lambda axis, x: (_fan_out(axis, x), None),
  lambda axis, _, cotangent: (jax.lax.psum(cotangent, axis),),
)


@dataclasses.dataclass(frozen=True)
class Shards:
  """Where the tokens and latents of a batch are, seen from one device.

  Attributes:
    data_axis: mesh axis of the tokens, inside shard_map; None for one shard.
    latent_axis: mesh axis of the latents, inside shard_map.
    micro_batches: parts of a device's tokens that are worked on in turn.
  """

  data_axis: str | None = None
  latent_axis: str | None = None
  micro_batches: int = 1

  def over_tokens(self, x: jax.Array) -> jax.Array:
    """The sum over the shards of the tokens."""
    return jax.lax.psum(x, self.data_axis) if self.data_axis else x

  def over_latents(self, x: Any) -> Any:
    """The sum over the shards of the latents, of an array or a tree."""
    return _psum(self.latent_axis, x) if self.latent_axis else x

  def to_latents(self, x: jax.Array) -> jax.Array:
    """The same on every shard of the latents; its gradient is summed."""
    return _fan_out(self.latent_axis, x) if self.latent_axis else x

  def anywhere(self, flag: jax.Array) -> jax.Array:
    """Whether it is true on any shard; the same answer on all."""
    axes = [axis for axis in (self.data_axis, self.latent_axis) if axis]
    return jax.lax.psum(flag.astype(jnp.int32), axes) > 0 if axes else flag

  @property
  def token_shards(self) -> int:
    """How many shards the tokens have."""
    return jax.lax.axis_size(self.data_axis) if self.data_axis else 1

  @property
  def latent_shards(self) -> int:
    """How many shards the latents have."""
    return jax.lax.axis_size(self.latent_axis) if self.latent_axis else 1

  def in_parts(self, batch: int, parts: int) -> 'Shards':
    """The same with at least so many micro-batches of `batch` tokens."""
    least = min(batch, max(parts, self.micro_batches))
    even = next(n for n in range(least, batch + 1) if not batch % n)
    return dataclasses.replace(self, micro_batches=even)

  def fold(
    self, run: Callable, start: Any, *tokens: jax.Array
  ) -> tuple[Any, Any]:
    """Runs over the micro-batches and adds up.

    Args:
      run: some tokens -> (what is added up, what is kept of each token).
      start: zeros shaped as what is added up.
      *tokens: arrays [B, ...] of this device.

    Returns:
      The total, and what is kept of all tokens.
    """
    if self.micro_batches == 1:
      return run(*tokens)

    def add(total, some):
      found, kept = run(*some)
      return jax.tree.map(jnp.add, total, found), kept

    parts = [t.reshape(self.micro_batches, -1, *t.shape[1:]) for t in tokens]
    total, kept = jax.lax.scan(add, start, parts)
    return total, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), kept)


def zeros_like(tree: Any, *like: jax.Array) -> Any:
  """Zeros that vary over the mesh axes of the tree's leaves and of `like`."""
  return jax.tree.map(lambda a: varying.zeros(a.shape, a.dtype, a, *like), tree)
