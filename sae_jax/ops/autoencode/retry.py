"""Few candidates from every shard, and all of them if those were too few."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax.ops import micro_batches, varying
from sae_jax.ops.autoencode import candidates


def with_few_candidates(
  run: Callable,
  start: Any,
  x_BD: jax.Array,
  *,
  k: int,
  n_latents: int,
  latent_axis: str | None = None,
  data_axis: str | None = None,
) -> tuple[Any, Any]:
  """Values and gradients of `autoencode` on as few candidates as will do.

  The k winners of a token are spread over the shards of the latents, so
  `candidates.width` candidates from each shard are nearly always enough, and
  lists are shorter. `Coded.exhausted` says when they may not have been: then
  the batch is done again with lists of k. One batch in a thousand costs double
  for that, and the result is exact.

  The branch surrounds a whole pass, forward and backward: arrays that the
  forward pass saves have the length of the lists, so a branch within it could
  not change them.

  Args:
    run: (tokens, candidates or None for all) -> (sums over tokens, a pair of
      any tree and `Diagnostics`; values of each token, a tree of arrays
      [B, ...]; `Coded.exhausted`).
    start: zeros shaped as the sums.
    x_BD: this device's tokens.
    k: the greatest of the ks of `autoencode`.
    n_latents: of this shard.
    latent_axis: mesh axis of the latents, inside shard_map.
    data_axis: mesh axis of the tokens, inside shard_map.

  Returns:
    The sums and the values of each token. `Diagnostics.redone` counts all
    tokens if the batch was done again.
  """
  batch = x_BD.shape[0]
  shards = jax.lax.axis_size(latent_axis) if latent_axis else 1
  offered = candidates.width(k, shards, batch)

  def with_all(x_BD):
    total, values, _ = run(x_BD, None)
    return total, values

  if offered >= min(k, n_latents):
    return with_all(x_BD)
  total, values, exhausted = run(x_BD, offered)

  def again():
    # Lists are k / offered times as long, so micro-batches are smaller by the
    # same factor: the second look must fit the memory of the first one.
    number = micro_batches.number(batch, -(-k // offered))
    (total, diagnostics), values = micro_batches.fold(
      with_all, start, number, x_BD
    )
    redone = jnp.full_like(diagnostics.redone, batch)
    redone = varying.match(redone, diagnostics.redone)
    return (total, diagnostics.replace(redone=redone)), values

  axes = tuple(axis for axis in (data_axis, latent_axis) if axis)
  return jax.lax.cond(anywhere(exhausted, axes), again, lambda: (total, values))


def anywhere(flag: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Whether a flag is true on any shard of some mesh axes.

  All shards get the same answer: the branches it selects contain collectives.
  """
  return jax.lax.psum(flag.astype(jnp.int32), axes) > 0 if axes else flag
