"""Which rows the scan reads, what each serves, and reading them ahead."""

from collections.abc import Iterator
import contextlib
import dataclasses

import jax
from jax.sharding import Mesh
import numpy as np

from sae_jax import store as store_lib
from sae_jax.feed import ahead
from sae_jax.feed import rows as rows_lib
from sae_jax.feed.rows import Rows
from sae_jax.feed.text_rows import TextRows
from sae_jax.probing.scan import codes
from sae_jax.probing.scan.config import ScanConfig
from sae_jax.probing.scan.state import Batch

# Batches that are read while the devices work.
_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Segment:
  """Rows that are read one after the other.

  Attributes:
    start: first row.
    stop: one past the last.
    features: whether statistics, examples and codes are of them.
    pca: those that principal components are fitted to.
    test: those that metrics are of.
  """

  start: int
  stop: int
  features: bool
  pca: range = range(0)
  test: range = range(0)

  def part(self, start: int, stop: int) -> 'Segment':
    """Some rows of it."""

    def inside(span):
      return range(
        *(min(max(row, start), stop) for row in (span.start, span.stop))
      )

    return Segment(
      start, stop, self.features, inside(self.pca), inside(self.test)
    )


def segments(config: ScanConfig, store: store_lib.Text) -> list[Segment]:
  """All rows that serve anything, in order; each is in one segment."""
  test = store.test_rows[: config.eval_rows]
  n_features = min(store.manifest.n_rows, config.feature_rows)
  pca = range(min(store.n_train, config.pca_rows))
  pieces = [
    Segment(0, n_features, True, pca, test),
    # The first test row is none of those that components are fitted to.
    Segment(n_features, pca.stop, False, pca, test),
    Segment(max(n_features, test.start), test.stop, False, pca, test),
  ]
  return [
    piece.part(piece.start, piece.stop)
    for piece in pieces
    if piece.start < piece.stop
  ]


def batches(
  pieces: list[Segment], size: int, from_row: int = 0
) -> list[Segment]:
  """Segments of at most `size` rows, each within a shard of the codes.

  Args:
    pieces: from `segments`.
    size: rows of a batch.
    from_row: the first row that is left to do.
  """
  parts = []
  for piece in pieces:
    start = max(piece.start, from_row)
    while start < piece.stop:
      stop = min(start + size, piece.stop)
      if piece.features:
        stop = min(stop, start - start % codes.SHARD_ROWS + codes.SHARD_ROWS)
      parts.append(piece.part(start, stop))
      start = stop
  return parts


@contextlib.contextmanager
def read_ahead(
  parts: list[Segment], store: Rows, size: int, mesh: Mesh
) -> Iterator[Iterator[tuple[Segment, Batch]]]:
  """The batches on the devices, those of a store before they are needed.

  Args:
    parts: from `batches`.
    store: the rows.
    size: rows of a batch on the devices; a short one is filled with copies.
    mesh: the mesh.

  Raises:
    UserError: if a row cannot be read or is not finite.
  """
  items = ((part, read(part, store, size, mesh)) for part in parts)
  if isinstance(store, TextRows):
    # All processes dispatch all programs in the same order, so in one thread.
    yield items
    return
  with contextlib.closing(ahead.iterate(items, _AHEAD, 'scan')) as ready:
    yield ready


def read(part: Segment, store: Rows, size: int, mesh: Mesh) -> Batch:
  """The batch of some rows."""
  raw_BD = rows_lib.read_rows(
    store, part.start, size, mesh, stop=part.stop, finite=True
  )
  known = {}

  def of(which):
    def values(start, stop):
      if (start, stop) not in known:
        known[start, stop] = documents_and_positions(store, start, stop)
      return known[start, stop][which]

    return rows_lib.place(values, part.start, part.stop, (size,), mesh, 'B')

  return batch_of(
    raw_BD,
    of(0),
    of(1),
    part,
  )


def documents_and_positions(
  store: store_lib.Text, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
  """Document and position in the context of rows start to stop, int32 each."""
  place_R = store.stream_index(start, stop)
  first = place_R[0]
  _, documents, positions = store.stream(first, place_R[-1] + 1)
  return documents[place_R - first], positions[place_R - first]


def batch_of(
  raw_BD: jax.Array,
  document_B: jax.Array,
  position_B: jax.Array,
  part: Segment,
) -> Batch:
  """A batch of rows, whose numbers may pass 2**32."""

  def places(of: range) -> np.ndarray:
    return np.int32([of.start - part.start, of.stop - part.start])

  return Batch(
    raw_BD,
    document_B,
    position_B,
    row_hi=np.uint32(part.start >> 32),
    row_lo=np.uint32(part.start & 0xFFFFFFFF),
    size=np.int32(part.stop - part.start),
    pca=places(part.pca),
    test=places(part.test),
  )
