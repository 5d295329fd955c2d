"""Times reading a store: in order and shuffled, from disk, and while training.

Prints one JSON line last. For each of --repeats, one after the other and each
with the store's files dropped from the page cache:

  plain      the files' bytes, read one after the other by `read`
  in_order   all rows by `Store.read_rows`, checksums included
  shuffled   an epoch of batches as a run gets them, checksums included

and `shuffled_over_plain`, the median of the ratios of each repeat's rates. Then
the demo's autoencoder is trained for --steps on such batches, and
`feed_wait_share` is the part of the time that it waited for them.

A virtual machine's disk may be cached by its host, which nothing here drops:
the first reading is left out, so that all are served alike.

  python -m experiments.benchmarks.store --workdir=runs/store --gib=4
"""

import dataclasses
import json
import os
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import autoencoder, errors, mesh, store
from sae_jax import config as config_lib
from sae_jax.cli import flags, huge_pages
from sae_jax.feed import from_store
from sae_jax.store import layout, manifest, writer
from sae_jax.training import loop, step
from sae_jax.training import state as state_lib
from sae_jax.training.config import TrainConfig

_BLOCK = 2**23
_CONTEXT = 128
_SITE = 'blocks.0.resid_post'


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(config_lib.Config):
  """The store that is read, and the run that reads it."""

  gib: float = config_lib.option(4.0, 'size of the stored activations, GiB')
  d: int = config_lib.option(576, 'width of the activations, D', least=1)
  dtype: str = config_lib.option(
    'float32', 'dtype of the stored activations', ('float32', 'bfloat16')
  )
  chunk_rows: int = config_lib.option(
    1024, 'number of rows in a chunk, the smallest piece that is read'
  )
  shard_rows: int = config_lib.option(
    65_536, 'number of rows in a shard, a stored object'
  )
  batch: int = config_lib.option(2048, 'number of rows in a batch', least=1)
  window_chunks: int = config_lib.option(
    64, 'chunks whose rows are mixed', least=1
  )
  repeats: int = config_lib.option(
    5, 'times that each way of reading is measured', least=1
  )
  n: int = config_lib.option(
    4096, 'number of latents of the autoencoder that is trained, N', least=1
  )
  k: int = config_lib.option(
    32, 'number of active latents of a token, K', least=1
  )
  steps: int = config_lib.option(200, 'number of training steps', least=2)


def make(config: BenchmarkConfig, url: str) -> store.Store:
  """Opens the store; writes it first if it is absent."""
  plan = manifest.StorePlan(
    subject='none',
    sites=(_SITE,),
    d_model=config.d,
    dtype=config.dtype,
    chunk_rows=config.chunk_rows,
    shard_rows=config.shard_rows,
    context_length=_CONTEXT,
  )
  width = config.d * jnp.dtype(config.dtype).itemsize
  n_rows = int(config.gib * 2**30 / width)
  n_rows -= n_rows % _CONTEXT
  if layout.read_manifest(url) is None:
    rng = np.random.default_rng(0)

    def stretches():
      for start in range(0, n_rows, config.shard_rows):
        size = min(config.shard_rows, n_rows - start)
        rows = rng.standard_normal((size, config.d), np.float32)
        places = np.arange(start, start + size)
        yield (
          places % 1000,
          places // _CONTEXT,
          places % _CONTEXT,
          np.ones(size, bool),
          {_SITE: rows.astype(jnp.dtype(config.dtype))},
        )

    writer.write(url, plan, stretches(), holdout_rows=32 * _CONTEXT)
  opened = store.open_store(url)
  facts = opened.manifest
  for name, want in (('n_rows', n_rows), *dataclasses.asdict(plan).items()):
    if getattr(facts, name) != want and name in (
      'n_rows', 'd_model', 'dtype', 'chunk_rows', 'shard_rows'
    ):  # fmt: skip
      raise errors.UserError(
        f'store {url} has {name} {getattr(facts, name)}, not {want}: use '
        'another workdir, or the flags that it was made with'
      )
  return opened


def objects(url: str) -> list[pathlib.Path]:
  """The files that hold the activations, in order."""
  folder = pathlib.Path(url, 'activations')
  paths = [path for path in folder.glob('*/c/*/0') if path.is_file()]
  return sorted(paths, key=lambda path: int(path.parent.name))


def forget(paths: list[pathlib.Path]) -> None:
  """Drops files from the page cache."""
  for path in paths:
    descriptor = os.open(path, os.O_RDONLY)
    try:
      os.fsync(descriptor)
      os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
      os.close(descriptor)


def plain(opened: store.Store) -> int:
  """Reads the files; returns bytes."""
  total = 0
  for path in objects(opened.url):
    with path.open('rb', buffering=0) as file:
      while block := file.read(_BLOCK):
        total += len(block)
  return total


def in_order(opened: store.Store, rows: int = 65_536) -> int:
  """Reads all rows in order; returns bytes."""
  n_rows = opened.manifest.n_rows
  for start in range(0, n_rows, rows):
    opened.read_rows(start, min(n_rows, start + rows))
  size = opened.activations.dtype.numpy_dtype.itemsize
  return n_rows * opened.manifest.d_model * size


def shuffled(opened: store.Store, config: BenchmarkConfig) -> int:
  """Reads an epoch of batches; returns bytes."""
  order = from_store.train_order(
    opened,
    0,
    config.window_chunks,
    from_store.lanes_for(opened, config.batch),
  )
  batches = from_store.StoreFeed(opened, order, config.batch)
  for _ in batches.iterate(0, order.n_rows // config.batch):
    pass
  return batches.bytes_read


def rates(opened: store.Store, config: BenchmarkConfig) -> list[dict]:
  """MB/s of each kind, repeat by repeat."""
  paths = objects(opened.url)
  plain(opened)
  readings = []
  for _ in range(config.repeats):
    reading = {}
    for name, read in (
      ('plain', plain),
      ('in_order', in_order),
      ('shuffled', lambda opened: shuffled(opened, config)),
    ):
      # Opened anew, so that it holds nothing of an earlier reading.
      fresh = store.open_store(opened.url)
      forget(paths)
      began = time.perf_counter()
      total = read(fresh)
      reading[name] = total / 1e6 / (time.perf_counter() - began)
    readings.append(reading)
    print(json.dumps(reading), flush=True)
  return readings


def waiting(opened: store.Store, config: BenchmarkConfig) -> dict[str, float]:
  """Trains as the demo does; the share of time spent waiting for batches."""
  training = TrainConfig(
    sae=autoencoder.SaeConfig(d_model=config.d, n_latents=config.n, k=config.k),
    batch_size=config.batch,
    steps=config.steps,
    window_chunks=config.window_chunks,
  )
  devices = mesh.make_mesh()
  state = state_lib.init_state(training, devices, opened.read_rows(0, 4096))
  do = step.make_step(training, devices)
  order = from_store.train_order(opened, 0, config.window_chunks)
  batches = from_store.StoreFeed(opened, order, config.batch, devices)
  clock = loop.Clock(batches)
  forget(objects(opened.url))
  seconds = []
  for batch_BD in clock.timed(batches.iterate(0, config.steps)):
    began = time.perf_counter()
    state, values = do(state, batch_BD)
    jax.block_until_ready(values)
    seconds.append(time.perf_counter() - began)
  return clock.metrics() | {'step_s_median': statistics.median(seconds[1:])}


def work() -> None:
  """Measures as the flags say."""
  config = flags.read(BenchmarkConfig)
  opened = make(config, str(pathlib.Path(flags.url('workdir'), 'store')))
  readings = rates(opened, config)
  middle = {
    f'{name}_mb_s': statistics.median(reading[name] for reading in readings)
    for name in readings[0]
  }
  ratios = [reading['shuffled'] / reading['plain'] for reading in readings]
  print(
    json.dumps(
      dataclasses.asdict(config)
      | middle
      | {
        'shuffled_over_plain': statistics.median(ratios),
        'shuffled_over_plain_range': [min(ratios), max(ratios)],
        'shuffled_over_in_order': statistics.median(
          reading['shuffled'] / reading['in_order'] for reading in readings
        ),
      }
      | waiting(opened, config)
    )
  )


if __name__ == '__main__':
  huge_pages.use_huge_pages()
  flags.define(BenchmarkConfig)
  flags.define_url(
    'workdir', 'folder in which store/ is written, and reused the next time'
  )
  flags.run(work, __doc__)
