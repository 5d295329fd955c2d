"""Contexts cut into a store's shards, and these into pools for the subject."""

from collections.abc import Iterator
import itertools
from typing import Any, NamedTuple

from sae_jax.harvesting import pools
from sae_jax.text import contexts as contexts_lib


class Work(NamedTuple):
  """A pool of contexts of one shard, and whether it is the shard's last."""

  shard: int
  contexts: list[contexts_lib.Context]
  last: bool


class Shards:
  """Cuts contexts into shards.

  A shard takes contexts as long as the rows that they should give fit. One that
  is there keeps those that it has, which may be fewer if less was wanted then.

  Attributes:
    number: of shards that there were so far.
    expected: rows that they should have.
  """

  def __init__(
    self, config: Any, contexts: Iterator[contexts_lib.Context], writer: Any
  ):
    """No context is read yet.

    Args:
      config: the HarvestConfig.
      contexts: in the order of the stream.
      writer: the StoreWriter, which says what shards are there.
    """
    self._config, self._contexts, self._plan = config, contexts, writer.plan
    self._records = writer.records()
    self._ahead = []
    self.number, self.expected = 0, 0

  def first_pool(self) -> list[contexts_lib.Context]:
    """The contexts that the mask is fitted to."""
    self._ahead = list(
      itertools.islice(self._contexts, pools.size(self._config))
    )
    return self._ahead[:]

  def missing(self, process: tuple[int, int], bar: Any) -> Iterator[Work]:
    """The pools of the shards that this process is to make.

    Args:
      process: its number, and how many there are.
      bar: the progress bar, which is told of rows that are there.
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
          yield Work(
            self.number,
            contexts[start : start + size],
            start + size >= len(contexts),
          )
      self.number += 1

  def _take(self, record) -> list[contexts_lib.Context]:
    taken, rows, tokens = [], 0, 0
    room = self._plan
    while record is None or len(taken) < record.contexts:
      context = (
        self._ahead.pop(0) if self._ahead else next(self._contexts, None)
      )
      if context is None:
        break
      rows += pools.expected(self._config, context)
      tokens += len(context.tokens)
      full = rows > room.shard_rows or tokens > room.shard_stream
      if record is None and full:
        self._ahead.insert(0, context)
        break
      taken.append(context)
      self.expected += pools.expected(self._config, context)
      if record is None and self.expected >= self._config.n_tokens:
        break
    return taken
