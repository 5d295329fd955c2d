"""How a batch is split: over the devices, and in time."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax.sparse import varying


@dataclasses.dataclass(frozen=True)
class Split:
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

  def over_latents(self, x: jax.Array) -> jax.Array:
    """The sum over the shards of the latents."""
    return jax.lax.psum(x, self.latent_axis) if self.latent_axis else x

  @property
  def token_shards(self) -> int:
    """How many shards the tokens have."""
    return jax.lax.axis_size(self.data_axis) if self.data_axis else 1

  @property
  def latent_shards(self) -> int:
    """How many shards the latents have."""
    return jax.lax.axis_size(self.latent_axis) if self.latent_axis else 1

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
