"""How a batch is cut: into shards over devices, and into micro-batches."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax

from sae_jax.ops import micro_batches, varying


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _psum(axis, x):
  """A sum over an axis whose shards then all compute the same.

  So each shard's cotangent is already the whole one. shard_map's types would
  say so to autodiff, but interpreted kernels do not work with these types.
  """
  return jax.lax.psum(x, axis)


def _psum_backward(axis, _, cotangent):
  return (jax.tree.map(lambda g: varying.mark(g, axis), cotangent),)


_psum.defvjp(lambda axis, x: (_psum(axis, x), None), _psum_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fan_out(axis, x):
  """Marks an array that is equal on all shards of an axis as varying over it.

  The shards' cotangents differ and are summed: the counterpart of `_psum`.
  """
  return varying.mark(x, axis)


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
    micro_batches: number of parts in which the device's tokens are worked on.
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
    """The array for each shard of the latents; its gradients are summed."""
    return _fan_out(self.latent_axis, x) if self.latent_axis else x

  @property
  def token_shards(self) -> int:
    """How many shards the tokens have."""
    return jax.lax.axis_size(self.data_axis) if self.data_axis else 1

  @property
  def latent_shards(self) -> int:
    """How many shards the latents have."""
    return jax.lax.axis_size(self.latent_axis) if self.latent_axis else 1

  def with_micro_batches(self, batch: int, least: int) -> 'Shards':
    """The same with at least `least` micro-batches of `batch` tokens."""
    number = micro_batches.number(batch, max(least, self.micro_batches))
    return dataclasses.replace(self, micro_batches=number)

  def fold(
    self, run: Callable, start: Any, *tokens: jax.Array
  ) -> tuple[Any, Any]:
    """`micro_batches.fold` over this device's tokens."""
    return micro_batches.fold(run, start, self.micro_batches, *tokens)


def zeros_like(tree: Any, *like: jax.Array) -> Any:
  """Zeros that vary over the mesh axes of the tree's leaves and of `like`."""
  return jax.tree.map(lambda a: varying.zeros(a.shape, a.dtype, a, *like), tree)
