"""A batch in equal pieces, worked on one after another for less memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def number(batch: int, least: int) -> int:
  """The least number of equal micro-batches that is not below `least`.

  Args:
    batch: tokens.
    least: the least number; a batch of fewer tokens is cut into single tokens.
  """
  least = min(batch, least)
  return next(n for n in range(least, batch + 1) if not batch % n)


def fold(
  run: Callable, start: Any, micro_batches: int, *tokens: jax.Array
) -> tuple[Any, Any]:
  """Runs over the micro-batches, adds up sums and concatenates the rest.

  Args:
    run: arrays of a micro-batch -> (sums, values of each token), both trees of
      arrays; the first axis of the second is that of the tokens.
    start: zeros shaped as the sums.
    micro_batches: how many; they divide the tokens.
    *tokens: arrays [B, ...] of this device.

  Returns:
    The sums over all tokens, and the values of each of them.
  """
  if micro_batches == 1:
    return run(*tokens)

  def add(total, batch):
    sums, values = run(*batch)
    return jax.tree.map(jnp.add, total, sums), values

  batches = [t.reshape(micro_batches, -1, *t.shape[1:]) for t in tokens]
  total, values = jax.lax.scan(add, start, batches)
  return total, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), values)
