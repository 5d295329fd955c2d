"""Batches made as they are used: the subject runs on the training's devices.

A text feed goes on where the text of a store ends. It takes none of the store's
documents, and uses the store's mask and validation rows. So a small store is
enough: it says how activations are made and what a run is scored and probed on,
and no others are stored.

Rows are mixed within windows of a number of pools of contexts. A window lies on
the devices. While one is used the next is made, a pool at a time. When the text
ends it begins again, in new windows.

A batch is a function of the store, the seed and the step, whatever the mesh;
only rounding may decide whether a row at the limit of the norm rule is kept.
To go on, a run keeps where its window began (`Cursor`): the text before that is
read again, but not tokenized, and the subject does not run on it.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import itertools
import math
import threading
from typing import Any

from absl import logging
import jax
import numpy as np

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax import store as store_lib
from sae_jax import subject as subject_lib
from sae_jax.feed import ahead, device_window
from sae_jax.feed import order as order_lib
from sae_jax.harvesting import pools, source
from sae_jax.harvesting.config import HarvestConfig
from sae_jax.store import layout
from sae_jax.store import manifest as manifest_lib
from sae_jax.store.manifest import Mask
from sae_jax.subject import capture
from sae_jax.text import contexts as contexts_lib

# Pools of contexts that are tokenized ahead.
_POOLS_AHEAD = 2
# Steps whose cursors are in memory: checkpoints are of one of the last.
_CURSORS = 4


@dataclasses.dataclass(frozen=True)
class Cursor:
  """Where a window begins.

  Attributes:
    first: start of the first context after the store's; when the text ends,
      the feed begins here again.
    next: start of the window's first context.
    first_tokens: digest of the tokens of the context at `first`.
    next_tokens: the same of `next`; they show whether the text has changed.
    window: number of the window, from 0.
    rows: rows of the windows before it.
  """

  first: contexts_lib.Start
  next: contexts_lib.Start
  first_tokens: str
  next_tokens: str
  window: int = 0
  rows: int = 0


def _digest(context: contexts_lib.Context) -> str:
  return manifest_lib.sha256(context.tokens)[:16]


class TextFeed:
  """Batches from text, with the interface of `batches.Batches`.

  Attributes:
    bytes_read: None, since no activations are read.
  """

  bytes_read = None

  def __init__(
    self,
    store: store_lib.Store,
    batch_size: int,
    seed: int,
    window_chunks: int,
    mesh: jax.sharding.Mesh,
    cursor: dict[str, Any] | None = None,
    subject: subject_lib.Subject | None = None,
    workers: int = 0,
    moved_to: str = '',
  ):
    """Without a cursor, reads the store's text to find its end.

    Args:
      store: the store whose text goes on.
      batch_size: B.
      seed: of the order within windows.
      window_chunks: size of a window, in chunks of the store.
      mesh: where the subject and the batches lie.
      cursor: the cursor of a run that is resumed; None for a new run.
      subject: the subject, if it is loaded already.
      workers: processes that tokenize; 0 tokenizes in this process.
      moved_to: where the subject is now; '' for where it was.

    Raises:
      UserError: if the store was not harvested, its text or subject changed, or
        there is no text after its own.
    """
    self._mask = _mask(store)
    config = dataclasses.replace(
      config_lib.from_dict(
        HarvestConfig, store.manifest.config, f'the config of store {store.url}'
      ),
      tokenizer_workers=workers,
    )
    subject = _subject(store, subject, mesh, moved_to)
    sites = [
      capture.parse_site(site, subject.config) for site in store.manifest.sites
    ]
    self._config, self._store = config, store
    self._batch_size, self._seed = batch_size, seed
    self._subject = subject
    self._new_window = functools.partial(
      device_window.DeviceWindow,
      pools.Forward(config, subject, tuple(sites), mesh),
      store.site,
      _pools_of_window(store, config, window_chunks),
      store.manifest.d_model,
    )
    self._start = _parsed(cursor) if cursor else self._first_cursor()
    self._cursors = {}

  def iterate(
    self, start_step: int, stop_step: int | None = None
  ) -> Iterator[jax.Array]:
    """Batches of start_step to stop_step.

    Args:
      start_step: the step of the cursor.
      stop_step: the step to stop before; None never stops.

    Yields:
      float32 [B, D] on the mesh. Close the generator to end its processes.
    """
    steps = itertools.count(start_step)
    if stop_step is not None:
      steps = range(start_step, stop_step)
    # A thread tokenizes. The subject runs in this one: all processes of a run
    # must dispatch all programs in the same order, training steps included.
    closed = threading.Event()
    pools_ahead = ahead.iterate(
      self._pools(self._start, closed), _POOLS_AHEAD, 'text feed', closed
    )
    with contextlib.closing(pools_ahead) as text:
      windows = _Windows(
        self._new_window,
        self._mask,
        text,
        self._start,
        self._batch_size,
        self._seed,
      )
      for step in steps:
        batch_BD, self._last_window, cursor = windows.batch(step)
        self._cursors[step + 1] = cursor
        self._cursors.pop(step + 1 - _CURSORS, None)
        yield batch_BD

  def cursor(self, step: int) -> dict[str, Any]:
    """What a checkpoint keeps to resume after a step, one of the last few."""
    return dataclasses.asdict(self._cursors[step])

  def describe(self, step: int) -> str:
    """Where the last batch comes from."""
    del step
    window = self._last_window
    return (
      f'its rows are finite, of window {window.window} of the text, which '
      f'begins with document {window.next.number}'
    )

  def _contexts(self, start, closed=None):
    """Contexts of the text from `start` on, until `closed` is set."""
    text = source.documents(self._config)
    if closed is not None:
      # Checked per document: those before the start give no context.
      text = itertools.takewhile(lambda _: not closed.is_set(), text)
    return source.contexts(self._config, text, self._subject, start)

  def _first_cursor(self) -> Cursor:
    """Where the first window of a new run begins."""
    first = self._after_the_store()
    digest = _digest(first)
    return Cursor(first.start, first.start, digest, digest)

  def _after_the_store(self) -> contexts_lib.Context:
    """The first context with none of the store's documents.

    Raises:
      UserError: if there is none, or the text is not the one harvested.
    """
    tokens = self._store.tokens()
    last, seen, first = int(self._store.documents()[-1]), 0, None
    with contextlib.closing(self._contexts(contexts_lib.BEGINNING)) as contexts:
      for context in contexts:
        stored = tokens[seen : seen + len(context.tokens)]
        if not len(stored) and context.documents[0] > last:
          first = context
          break
        # The last document may go on beyond the store.
        if not np.array_equal(stored, context.tokens[: len(stored)]):
          break
        seen += len(stored)
    sources = ', '.join(self._config.sources)
    if seen < len(tokens):
      raise errors.UserError(
        f'the text of {sources} is not what store {self._store.url} was '
        'harvested from: harvest it again'
      )
    if first is None:
      raise errors.UserError(
        f'{sources} has no text after the documents of store '
        f'{self._store.url}: harvest a smaller store, or name more text'
      )
    return first

  def _pools(
    self, cursor: Cursor, closed: threading.Event
  ) -> Iterator[list[contexts_lib.Context]]:
    """Pools of contexts without end.

    Raises:
      UserError: if the text is missing or has changed.
    """
    start, digest = cursor.next, cursor.next_tokens
    size, pool = pools.size(self._config), []
    while not closed.is_set():
      with contextlib.closing(self._contexts(start, closed)) as contexts:
        first = next(contexts, None)
        if closed.is_set():
          return
        if first is None or (first.start, _digest(first)) != (start, digest):
          raise errors.UserError(
            f'the text of {", ".join(self._config.sources)} is not what this '
            f'run began with: document {start.number} of it is another: bring '
            'the text back, or use another workdir'
          )
        for context in itertools.chain([first], contexts):
          pool.append(context)
          if len(pool) == size:
            yield pool
            pool = []
      start, digest = cursor.first, cursor.first_tokens


def _mask(store: store_lib.Store) -> Mask:
  mask = layout.read_mask(store.url, store.manifest)
  if mask is None:
    raise errors.UserError(
      f'store {store.url} was not made by sae-harvest, it has no '
      f'{layout.MASK}: harvest a small one to stream on from'
    )
  return mask


def _subject(
  store: store_lib.Store,
  subject: subject_lib.Subject | None,
  mesh: jax.sharding.Mesh,
  moved_to: str,
) -> subject_lib.Subject:
  """The subject of a store, loaded if it is not given."""
  if subject is None:
    manifest = store.manifest
    return subject_lib.load_recorded(
      manifest.subject, manifest.weights_sha256, moved_to, mesh
    )
  store.check_subject(subject.name, subject.weights_sha256)
  return subject


def _pools_of_window(
  store: store_lib.Store, config: HarvestConfig, window_chunks: int
) -> int:
  """Pools of a window, if contexts give as many rows as the store's did."""
  n_contexts = int((store.positions() == 0).sum())
  pool_rows = pools.size(config) * store.manifest.n_rows / n_contexts
  return math.ceil(window_chunks * store.manifest.chunk_rows / pool_rows)


def _parsed(cursor: dict[str, Any]) -> Cursor:
  """A cursor from a checkpoint's JSON."""
  starts = {
    name: contexts_lib.Start(*cursor[name]) for name in ('first', 'next')
  }
  return Cursor(**(cursor | starts))


class _Windows:
  """The window in use, and the next one, which is made meanwhile."""

  def __init__(self, new_window, mask, text, cursor, batch_size, seed):
    """Makes the first window.

    Args:
      new_window: makes an empty window.
      mask: which tokens are kept.
      text: pools of contexts.
      cursor: where the first window begins.
      batch_size: B.
      seed: of the order within windows.
    """
    self._new_window, self._mask, self._text = new_window, mask, text
    self._batch_size, self._seed = batch_size, seed
    self._next, self._next_cursor = new_window(), cursor
    self._next_pool, self._warned = next(text), False
    self._advance()

  def batch(self, step: int) -> tuple[jax.Array, Cursor, Cursor]:
    """The batch of a step, its window's cursor, and the next step's cursor."""
    start, stop = step * self._batch_size, (step + 1) * self._batch_size
    row, pieces = start, []
    while row < stop:
      if row == self._stop:
        self._advance()
      end = min(stop, self._stop)
      first, size = row - self._cursor.rows, end - row
      slots_B = np.full(self._batch_size, -1, np.int32)
      slots_B[row - start :][:size] = self._slots[first : first + size]
      pieces.append(self._window.take(slots_B))
      row = end
    # The next window is filled as fast as this one is used, so that no step
    # waits for all of it.
    used = (stop - self._cursor.rows) / len(self._slots)
    while self._next.n_filled < int(used * self._next.n_pools):
      self._fill_next()
    after = self._next_cursor if stop == self._stop else self._cursor
    return sum(pieces[1:], pieces[0]), self._cursor, after

  def _advance(self) -> None:
    """Fills the next window, makes it the one in use and begins another."""
    while self._next.n_filled < self._next.n_pools:
      self._fill_next()
    slots = self._next.kept_slots(self._mask)
    if self._next.nonfinite and not self._warned:
      self._warned = True
      logging.warning(
        'activations of %d tokens of window %d of the text are not finite: '
        "they are left out, as of later windows; check the subject's weights",
        self._next.nonfinite,
        self._next_cursor.window,
      )
    if not len(slots):
      raise errors.UserError(
        'the mask of the store leaves no token of a window of text: harvest '
        'with another mask'
      )
    self._window, self._cursor = self._next, self._next_cursor
    mixed = order_lib.mixing(self._seed, self._cursor.window, len(slots))
    self._slots = slots[mixed]
    self._stop = self._cursor.rows + len(slots)
    self._next = self._new_window()
    self._next_cursor = dataclasses.replace(
      self._cursor,
      next=self._next_pool[0].start,
      next_tokens=_digest(self._next_pool[0]),
      window=self._cursor.window + 1,
      rows=self._stop,
    )

  def _fill_next(self) -> None:
    pool, self._next_pool = self._next_pool, next(self._text)
    self._next.append(pool)
