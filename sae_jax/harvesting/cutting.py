"""Contexts dealt to the shards of a store, and cut into pools of work."""

from collections.abc import Iterator
import itertools
from typing import Any, NamedTuple

from sae_jax.harvesting import pools
from sae_jax.harvesting.config import HarvestConfig
from sae_jax.store.manifest import Shard
from sae_jax.store.writer import StoreWriter
from sae_jax.text import contexts as contexts_lib


class Work(NamedTuple):
  """A pool of contexts of one shard.

  Attributes:
    shard: the shard's number.
    contexts: the pool.
    last: whether it is the last pool of the shard.
    is_first_pool: whether it is the pool that `Shards.first_pool` gave.
  """

  shard: int
  contexts: list[contexts_lib.Context]
  last: bool
  is_first_pool: bool


class Shards:
  """Deals contexts to shards.

  A shard takes contexts while their expected rows fit. A complete shard has the
  contexts it was made with: the last of a harvest may be short, and stays so
  when the harvest is continued with a larger n_tokens.

  Attributes:
    number: how many shards have been dealt so far.
    expected: rows that they should have, before the norm rule.
  """

  def __init__(
    self,
    config: HarvestConfig,
    contexts: Iterator[contexts_lib.Context],
    writer: StoreWriter,
  ):
    """Reads no context yet.

    Args:
      config: of the harvest.
      contexts: in the order of the token stream.
      writer: of the store, for its plan and its complete shards.
    """
    self._config, self._contexts, self._plan = config, contexts, writer.plan
    self._records = writer.records()
    self._ahead, self._first_size = [], 0
    self.number, self.expected = 0, 0

  def first_pool(self) -> list[contexts_lib.Context]:
    """The contexts that the mask is fitted to."""
    self._ahead = list(
      itertools.islice(self._contexts, pools.size(self._config))
    )
    self._first_size = len(self._ahead)
    return self._ahead[:]

  def missing(self, process: tuple[int, int], bar: Any) -> Iterator[Work]:
    """The work that is left for this process.

    Args:
      process: number of this process, and how many processes there are.
      bar: the progress bar; rows of complete shards are added to it.
    """
    index, count = process
    while self.expected < self._config.n_tokens:
      record = self._records.get(self.number)
      contexts = self._take(record)
      if not contexts:
        break
      if record is not None:
        bar.update(record.rows)
      elif self.number % count == index:
        size = pools.size(self._config)
        for start in range(0, len(contexts), size):
          pool = contexts[start : start + size]
          begins = self.number == start == 0
          yield Work(
            self.number,
            pool,
            last=start + size >= len(contexts),
            is_first_pool=begins and len(pool) == self._first_size,
          )
      self.number += 1

  def _take(self, record: Shard | None) -> list[contexts_lib.Context]:
    """The contexts of the next shard, by its record if it is complete."""
    taken, rows, tokens = [], 0, 0
    while record is None or len(taken) < record.contexts:
      context = (
        self._ahead.pop(0) if self._ahead else next(self._contexts, None)
      )
      if context is None:
        break
      rows += pools.expected(self._config, context)
      tokens += len(context.tokens)
      full = rows > self._plan.shard_rows or tokens > self._plan.shard_stream
      if record is None and full:
        self._ahead.insert(0, context)
        break
      taken.append(context)
      self.expected += pools.expected(self._config, context)
      if record is None and self.expected >= self._config.n_tokens:
        break
    return taken
