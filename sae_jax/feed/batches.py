"""The interface of a source of batches for training."""

from collections.abc import Generator
from typing import Any, Protocol

import jax


class Batches(Protocol):
  """A source of batches: `StoreFeed` or `TextFeed`.

  Attributes:
    bytes_read: bytes of activations read so far; None if none are read.
  """

  bytes_read: int | None

  def iterate(
    self, start_step: int, stop_step: int | None = None
  ) -> Generator[jax.Array, None, None]:
    """The batches of some steps, on the devices; close it when done."""

  def cursor(self, step: int) -> dict[str, Any]:
    """What a checkpoint keeps to resume after a step."""

  def describe(self, step: int) -> str:
    """Where the batch of a step comes from, and whether it is finite."""
