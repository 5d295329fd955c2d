"""A batch in equal pieces, worked on one after another for less memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def number(batch: int, least: int) -> int:
  """The least number of equal micro-batches, of at least so many.

  Args:
    batch: tokens.
    least: micro-batches wanted; a batch of fewer tokens has one of each.
  """
  least = min(batch, least)
  return next(n for n in range(least, batch + 1) if not batch % n)


def fold(
  run: Callable, start: Any, micro_batches: int, *tokens: jax.Array
) -> tuple[Any, Any]:
  """Runs over the micro-batches and adds up.

  Args:
    run: arrays of a micro-batch -> (what is added up, what is kept), both
      trees of arrays; the first axis of what is kept is that of the tokens.
    start: zeros shaped as what is added up.
    micro_batches: how many; they divide the tokens.
    *tokens: arrays [B, ...] of this device.

  Returns:
    The total, and what is kept of all tokens.
  """
  if micro_batches == 1:
    return run(*tokens)

  def add(total, batch):
    value, kept = run(*batch)
    return jax.tree.map(jnp.add, total, value), kept

  batches = [t.reshape(micro_batches, -1, *t.shape[1:]) for t in tokens]
  total, kept = jax.lax.scan(add, start, batches)
  return total, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), kept)
