"""Few candidates of every shard, and all where those were too few."""

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

  The k winners of a token lie spread over the shards of the latents, so a
  shard that offers `candidates.width` of them all but always offers enough, and
  holds shorter lists. `Coded.exhausted` tells where it may not have: then all
  is done again, on lists as long as k, which costs a thousandth of the batches
  double and makes the result exact.

  It goes around a whole pass, forward and backward: what the forward pass
  saves has the length of the lists, which no branch inside of it could change.

  Args:
    run: (tokens, candidates or None for all) -> (what is added up over tokens
      as a pair (any tree, `Diagnostics`), what is kept of each token,
      `Coded.exhausted`).
    start: zeros shaped as what is added up.
    x_BD: this device's tokens.
    k: the greatest of the ks of `autoencode`.
    n_latents: of this shard.
    latent_axis: mesh axis of the latents, inside shard_map.
    data_axis: mesh axis of the tokens, inside shard_map.

  Returns:
    What is added up, with all tokens redone where they were, and what is kept.
  """
  batch = x_BD.shape[0]
  shards = jax.lax.axis_size(latent_axis) if latent_axis else 1
  offered = candidates.width(k, shards, batch)

  def with_all(x_BD):
    total, kept, _ = run(x_BD, None)
    return total, kept

  if offered >= min(k, n_latents):
    return with_all(x_BD)
  total, kept, exhausted = run(x_BD, offered)

  def again():
    # Lists are longer by k / offered, so that tokens are fewer at a time by as
    # much: the second look must fit where the first one did.
    number = micro_batches.number(batch, -(-k // offered))
    (total, diagnostics), kept = micro_batches.fold(
      with_all, start, number, x_BD
    )
    redone = jnp.full_like(diagnostics.redone, batch)
    redone = varying.match(redone, diagnostics.redone)
    return (total, diagnostics.replace(redone=redone)), kept

  axes = tuple(axis for axis in (data_axis, latent_axis) if axis)
  return jax.lax.cond(anywhere(exhausted, axes), again, lambda: (total, kept))


def anywhere(flag: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Whether a flag is true on any shard of some mesh axes.

  The same answer on all of them: they have collectives in what depends on it.
  """
  return jax.lax.psum(flag.astype(jnp.int32), axes) > 0 if axes else flag
