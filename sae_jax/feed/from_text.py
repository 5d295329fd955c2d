"""Batches made as they are used: the subject runs on the training's devices.

A stream takes what comes after a store: the store's text goes on, its documents
are left out, its mask and its held-out rows stay. So a small store says all of
how activations are made and what a run is scored and probed on, and nothing
more is stored.

Rows are mixed in windows of so many pools of contexts. A window lies on the
devices; the host sees the norms of its activations alone, which say what is
kept. While one is used the next is made, a pool at a time. When the text ends
it begins again, in other windows.

What a batch holds is a function of the store, the seed and the step, on any
mesh; but rounding may decide whether a row at the limit of a norm rule is kept.
To go on, a run keeps where its window began (`Cursor`); text before
it is read again, and neither tokenized nor seen by the subject.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import itertools
import math
import threading
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax import mesh as mesh_lib
from sae_jax import store as store_lib
from sae_jax import subject as subject_lib
from sae_jax.feed import ahead
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
_CURSORS = 4


@dataclasses.dataclass(frozen=True)
class Cursor:
  """Where a window begins.

  Attributes:
    first: the stream's first context, where the text begins again.
    next: the window's first context.
    first_tokens: digest of the tokens of `first`, and
    next_tokens: of `next`, by which a text that changed is seen.
    window: the window's number.
    rows: of the windows before.
  """

  first: contexts_lib.Start
  next: contexts_lib.Start
  first_tokens: str
  next_tokens: str
  window: int = 0
  rows: int = 0


def _digest(context: contexts_lib.Context) -> str:
  return manifest_lib.sha256(context.tokens)[:16]


class _Window:
  """Activations on the devices, [data, rows of a device, D]."""

  def __init__(self, forward, mask, site, n_pools, d_model):
    self._forward, self._mask, self._site = forward, mask, site
    self.n_pools = n_pools
    config, mesh = forward.config, forward.mesh
    self._shards = mesh.shape['data']
    most = pools.size(config) * config.context_length
    self._room = n_pools * most // self._shards
    self._data = _zeros((self._shards, self._room, d_model), config.dtype, mesh)
    self._filled = 0
    self._pools = []

  @property
  def made(self) -> int:
    """Pools that it has."""
    return len(self._pools)

  def append(self, pool: list[contexts_lib.Context]) -> None:
    """Starts the forward passes of a pool."""
    offsets = []
    batches = self._forward.dispatch(pool)
    for _, outputs in batches:
      resid_CTD, _ = outputs[self._site]
      offsets.append(self._filled)
      self._data = _append(
        self._data, resid_CTD, self._filled, self._forward.mesh
      )
      contexts, length, _ = resid_CTD.shape
      self._filled += contexts // self._shards * length
    norms = [
      {name: outputs[name][1] for name in self._forward.names}
      for _, outputs in batches
    ]
    self._pools.append((pool, [batch for batch, _ in batches], norms, offsets))

  def rows(self) -> np.ndarray:
    """Where the rows that are kept lie, in the order of the text, int32."""
    config, found = self._forward.config, []
    for pool, batches, norms, offsets in self._pools:
      places = [None] * len(pool)
      for batch, norm, offset in zip(batches, norms, offsets):
        by_site = [np.asarray(norm[name]) for name in self._forward.names]
        of_a_shard = by_site[0].shape[0] // self._shards
        length = by_site[0].shape[1]
        for row, i in enumerate(batch):
          context = pool[i]
          keep = pools.kept(
            config,
            self._mask,
            context.positions,
            [norm_CT[row, : len(context.tokens)] for norm_CT in by_site],
          )
          shard, row = divmod(row, of_a_shard)
          start = shard * self._room + offset + row * length
          places[i] = start + np.flatnonzero(keep)
      found += places
    return np.concatenate(found).astype(np.int32)

  def take(self, places_B: np.ndarray) -> jax.Array:
    """Rows by their places, zeros where a place is -1; float32 [B, D]."""
    return _take(self._data, places_B, self._forward.mesh)


class TextFeed:
  """Batches of a stream, in the interface of a store's `feed.Feed`.

  Attributes:
    bytes_read: None, there is no store to read.
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
  ):
    """Reads text up to the end of the store's, unless there is a cursor.

    Args:
      store: which the stream goes on from.
      batch_size: B.
      seed: of the order in windows.
      window_chunks: a window is about as large as so many of the store's
        chunks.
      mesh: of the subject and of the batches.
      cursor: of the run that goes on; None for one that begins.
      subject: the subject, if it is loaded already.
      workers: processes that tokenize, 0 for this one.

    Raises:
      UserError: if the store was not harvested, its text or subject changed, or
        there is no text after it.
    """
    manifest = store.manifest
    mask = layout.read_json(store.url, manifest_lib.MASK, Mask)
    if mask is None:
      raise errors.UserError(
        f'store {store.url} was not made by sae-harvest, it has no '
        f'{manifest_lib.MASK}: harvest a small one to stream on from'
      )
    config = dataclasses.replace(
      config_lib.from_dict(HarvestConfig, manifest.config),
      tokenizer_workers=workers,
    )
    self._config, self._store = config, store
    self._batch_size, self._seed = batch_size, seed
    if subject is None:
      subject = subject_lib.load(manifest.subject, mesh=mesh)
    if subject.weights_sha256 != manifest.weights_sha256:
      raise errors.UserError(
        f'subject {subject.name} is not the model store {store.url} was '
        f'harvested from: use {manifest.subject} as it was'
      )
    self._tokenizer = subject.tokenizer
    sites = [
      capture.parse_site(site, subject.config) for site in manifest.sites
    ]
    forward = pools.Forward(config, subject, tuple(sites), mesh)
    # As many rows as a context of the store's gives.
    n_contexts = int((store.positions() == 0).sum())
    pool_rows = pools.size(config) * manifest.n_rows / n_contexts
    n_pools = math.ceil(window_chunks * manifest.chunk_rows / pool_rows)
    self._window = functools.partial(
      _Window, forward, mask, store.site, n_pools, manifest.d_model
    )
    if cursor:
      places = {
        name: contexts_lib.Start(*cursor[name]) for name in ('first', 'next')
      }
      self._start = Cursor(**(cursor | places))
    else:
      first = self._after_the_store()
      digest = _digest(first)
      self._start = Cursor(first.start, first.start, digest, digest)
    self._cursors = {}

  def iterate(
    self, start_step: int, stop_step: int | None = None
  ) -> Iterator[jax.Array]:
    """Batches of start_step to stop_step.

    Args:
      start_step: the step of the cursor.
      stop_step: the step to stop before; None never stops.

    Yields:
      float32 [B, D] on the mesh. Close it to end what tokenizes.
    """
    steps = itertools.count(start_step)
    if stop_step is not None:
      steps = range(start_step, stop_step)
    # Tokens come from a thread. The subject is run by this one: of many
    # processes each must dispatch all programs in one order, the steps among
    # them.
    closed = threading.Event()
    ready = ahead.iterate(
      self._made_pools(self._start, closed), _POOLS_AHEAD, 'stream', closed
    )
    with contextlib.closing(ready) as text:
      windows = _Windows(
        self._window, text, self._start, self._batch_size, self._seed
      )
      for step in steps:
        batch_BD, self._at, cursor = windows.batch(step)
        self._cursors[step + 1] = cursor
        self._cursors.pop(step + 1 - _CURSORS, None)
        yield batch_BD

  def cursor(self, step: int) -> dict[str, Any]:
    """What a checkpoint keeps to go on after a step, one of the last few."""
    return dataclasses.asdict(self._cursors[step])

  def describe(self, step: int) -> str:
    """Where a batch comes from: the last one."""
    del step
    return (
      f'its rows are finite, of window {self._at.window} of the stream, which '
      f'begins with document {self._at.next.number}'
    )

  def _contexts(self, start, closed=None):
    text = source.documents(self._config)
    if closed is not None:
      # Text is read up to the start: for as long as somebody waits for it.
      text = itertools.takewhile(lambda _: not closed.is_set(), text)
    return source.contexts(self._config, text, self._tokenizer, start)

  def _after_the_store(self) -> contexts_lib.Context:
    """The first context with none of the store's documents.

    Raises:
      UserError: if there is none, or the text is not what was harvested.
    """
    tokens = self._store.tokens()
    last, seen, found = int(self._store.documents()[-1]), 0, None
    with contextlib.closing(self._contexts(contexts_lib.BEGINNING)) as contexts:
      for context in contexts:
        part = tokens[seen : seen + len(context.tokens)]
        if not len(part) and context.documents[0] > last:
          found = context
          break
        # The last document may go on beyond the store.
        if not np.array_equal(part, context.tokens[: len(part)]):
          break
        seen += len(part)
    sources = ', '.join(self._config.sources)
    if seen < len(tokens):
      raise errors.UserError(
        f'the text of {sources} is not what store {self._store.url} was '
        'harvested from: harvest it again'
      )
    if found is None:
      raise errors.UserError(
        f'{sources} has no text after the documents of store '
        f'{self._store.url}: harvest a smaller store, or name more text'
      )
    return found

  def _made_pools(
    self, start: Cursor, closed: threading.Event
  ) -> Iterator[list[contexts_lib.Context]]:
    """Pools without end.

    Raises:
      UserError: if the text is not there, or is another.
    """
    place, digest = start.next, start.next_tokens
    size, pool = pools.size(self._config), []
    while not closed.is_set():
      with contextlib.closing(self._contexts(place, closed)) as contexts:
        first = next(contexts, None)
        if closed.is_set():
          return
        if first is None or (first.start, _digest(first)) != (place, digest):
          raise errors.UserError(
            f'the text of {", ".join(self._config.sources)} is not what this '
            f'run began with: document {place.number} of it is another: bring '
            'the text back, or use another workdir'
          )
        for context in itertools.chain([first], contexts):
          pool.append(context)
          if len(pool) == size:
            yield pool
            pool = []
      place, digest = start.first, start.first_tokens


class _Windows:
  """The window that is used, and the one that is made meanwhile."""

  def __init__(self, new_window, text, start, batch_size, seed):
    self._new_window, self._text = new_window, text
    self._batch_size, self._seed = batch_size, seed
    self._made, self._made_start = new_window(), start
    self._waiting = next(text)
    self._begin()

  def batch(self, step: int) -> tuple[jax.Array, Cursor, Cursor]:
    """The batch of a step, its window's start, and the next step's cursor."""
    start, stop = step * self._batch_size, (step + 1) * self._batch_size
    at, parts = start, []
    while at < stop:
      if at == self._stop:
        self._begin()
      end = min(stop, self._stop)
      first, size = at - self._start.rows, end - at
      places_B = np.full(self._batch_size, -1, np.int32)
      places_B[at - start :][:size] = self._places[first : first + size]
      parts.append(self._window.take(places_B))
      at = end
    # As much of the next window is made as is used of this one, so that steps
    # never wait for all of it.
    used = (stop - self._start.rows) / len(self._places)
    while self._made.made < int(used * self._made.n_pools):
      self._make()
    after = self._made_start if stop == self._stop else self._start
    return sum(parts[1:], parts[0]), self._start, after

  def _begin(self) -> None:
    """Makes what is missing of the next window, and goes on to it."""
    while self._made.made < self._made.n_pools:
      self._make()
    places = self._made.rows()
    if not len(places):
      raise errors.UserError(
        'the mask of the store leaves no token of a window of the stream: '
        'harvest with another mask'
      )
    self._window, self._start = self._made, self._made_start
    mixed = order_lib.mixing(self._seed, self._start.window, len(places))
    self._places = places[mixed]
    self._stop = self._start.rows + len(places)
    self._made, self._made_start = (
      self._new_window(),
      dataclasses.replace(
        self._start,
        next=self._waiting[0].start,
        next_tokens=_digest(self._waiting[0]),
        window=self._start.window + 1,
        rows=self._stop,
      ),
    )

  def _make(self) -> None:
    pool, self._waiting = self._waiting, next(self._text)
    self._made.append(pool)


def _zeros(shape, dtype, mesh):
  sharding = jax.sharding.NamedSharding(mesh, PartitionSpec('data'))
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.partial(jax.jit, static_argnames='mesh', donate_argnums=0)
def _append(data, resid_CTD, start, mesh):
  """Writes activations at row `start` of each device's rows."""

  def local(data, resid_CTD, start):
    rows = resid_CTD.reshape(1, -1, resid_CTD.shape[-1])
    return jax.lax.dynamic_update_slice(data, rows, (0, start, 0))

  split = PartitionSpec('data')
  return jax.shard_map(
    local, mesh=mesh, in_specs=(split, split, PartitionSpec()), out_specs=split
  )(data, resid_CTD, start)


@functools.partial(jax.jit, static_argnames='mesh')
def _take(data, places_B, mesh):
  """Rows by device and place, in the batch's sharding; zeros for -1."""

  def local(data, places_B):
    here_B = places_B - jax.lax.axis_index('data') * data.shape[1]
    inside_B = (here_B >= 0) & (here_B < data.shape[1]) & (places_B >= 0)
    rows_BD = (
      data[0].at[jnp.where(inside_B, here_B, 0)].get(mode='promise_in_bounds')
    )
    rows_BD = jnp.where(inside_B[:, None], rows_BD.astype(jnp.float32), 0)
    # Each row is on one device: the sum is exact.
    return jax.lax.psum_scatter(rows_BD, 'data', tiled=True)

  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(PartitionSpec('data'), PartitionSpec()),
    out_specs=mesh_lib.RULES.spec('BD'),
  )(data, places_B)
