"""What runs are trained on."""

from collections.abc import Generator
from typing import Any, Protocol

import jax


class Batches(Protocol):
  """What runs are trained on, `StoreFeed` or `TextFeed`.

  Attributes:
    bytes_read: from a store, so far; None where none is read.
  """

  bytes_read: int | None

  def iterate(
    self, start_step: int, stop_step: int | None = None
  ) -> Generator[jax.Array, None, None]:
    """Batches of steps, on the devices; to be closed."""

  def cursor(self, step: int) -> dict[str, Any]:
    """What goes into a checkpoint to go on after a step."""

  def describe(self, step: int) -> str:
    """Where a step's batch comes from, and whether it is finite."""
