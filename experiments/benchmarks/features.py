"""Times a feature table: written by shards, read by blocks, made into a page.

  python -m experiments.benchmarks.features --workdir=runs/features

Writes features/ with all columns, at the defaults' sizes, in which one of
--every latents fires; reads 100 random blocks of 64 latents and a column; then
builds the page of a second table, of --page latents that all fire. Prints one
JSON line for each part: seconds, bytes on disk, peak memory of this process.
"""

import dataclasses
import json
import os
import pathlib
import resource
import shutil
import time

import numpy as np

from sae_jax import config as config_lib
from sae_jax import features as features_lib
from sae_jax.browser import index
from sae_jax.cli import flags
from sae_jax.features import columns as columns_lib

VOCABULARY = 49_152
_SIZES = {
  'H': 64,
  'W': 33,
  'M top': 16,
  'M random': 8,
  'M near': 8,
  'deciles': 10,
  'M decile': 1,
  'V up': 10,
  'V down': 10,
  'neighbours': 5,
  'tokens': 10,
  'partners': 5,
  'tasks': 4,
  'V effect': 10,
}
_GROUPS = columns_lib.GROUPS
# Beginnings of columns that do not follow from what a latent fires on.
_OF_ALL = ('vote_', 'neighbour_', 'probe_', 'effect_', 'latent_ids')
_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(config_lib.Config):
  """The tables that are written."""

  latents: int = config_lib.option(
    2**20, 'number of latents of the table that is read', least=_BLOCK
  )
  every: int = config_lib.option(
    1000, 'one of so many of its latents fires', least=1
  )
  page: int = config_lib.option(
    65_536, 'number of latents of the page', least=_BLOCK
  )


def block(
  first: int, stop: int, every: int, n_latents: int
) -> dict[str, np.ndarray]:
  """Columns of latents, of which one in `every` fires."""
  rng = np.random.default_rng(first)
  count = stop - first
  live_N = (np.arange(first, stop) % every) == 0
  arrays = {}
  for name in columns_lib.of_groups(_GROUPS):
    column = columns_lib.COLUMNS[name]
    if column.is_shared:
      continue
    shape = (count, *column.row(_SIZES))
    most = 1 + min(column.most, VOCABULARY if column.is_token else 1000)
    if column.is_latent:
      most = n_latents
    if name == 'latent_ids':
      array = np.arange(first, stop)
    elif name.endswith('_peak'):
      array = np.full(shape, 24)
    elif column.dtype == 'float32':
      array = rng.random(shape, np.float32)
      # Latents are silent on most tokens of a window.
      if name.endswith('_acts'):
        array *= rng.random(shape, np.float32) < 0.1
    else:
      array = rng.integers(0, most - 1, shape)
    absent = -1 if column.least == -1 and column.dtype == 'int32' else 0
    # These do not follow from what a latent fires on.
    if not name.startswith(
      ('vote_', 'neighbour_', 'probe_', 'latent_ids', 'effect_')
    ):
      array[~live_N] = absent
    arrays[name] = array
  return arrays


def write(url: str, n_latents: int, every: int) -> float:
  """Writes a table shard by shard; returns seconds."""
  edges = np.geomspace(1e-2, 1e2, _SIZES['H'] + 1).astype(np.float32)
  names = columns_lib.axes(columns_lib.of_groups(_GROUPS))
  plan = features_lib.Plan(
    n_latents,
    {axis: _SIZES[axis] for axis in names},
    tuple(edges.tolist()),
    _GROUPS,
  )
  table, made = features_lib.TableWriter(url, plan), 0.0
  begin = time.perf_counter()
  for first, stop in table.blocks():
    start = time.perf_counter()
    columns = block(first, stop, every, n_latents)
    made += time.perf_counter() - start
    table.write(first, columns)
  table.seal({})
  return time.perf_counter() - begin - made


def read(url: str, n_latents: int) -> dict[str, float]:
  """Opens a table, and reads random blocks and a column."""
  start = time.perf_counter()
  table = features_lib.open(url, VOCABULARY)
  opened, times = time.perf_counter() - start, []
  for block in np.random.default_rng(0).integers(0, n_latents // _BLOCK, 100):
    start = time.perf_counter()
    table.latents(int(block) * _BLOCK, (int(block) + 1) * _BLOCK)
    times.append(1000 * (time.perf_counter() - start))
  start = time.perf_counter()
  table.column('density')
  return {
    'open_ms': 1000 * opened,
    'block_ms_median': float(np.median(times)),
    'block_ms_most': max(times),
    'column_seconds': time.perf_counter() - start,
  }


def on_disk(url: str) -> dict[str, float]:
  """Megabytes and number of the files of a folder."""
  files = [path for path in pathlib.Path(url).rglob('*') if path.is_file()]
  sizes = [path.stat().st_size for path in files]
  return {'megabytes': sum(sizes) / 1e6, 'files': len(sizes)}


def peak() -> float:
  """Peak memory of this process so far, GiB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def work() -> None:
  """Measures as the flags say."""
  config = flags.read(BenchmarkConfig)
  folder = pathlib.Path(flags.url('workdir'))
  table, page = str(folder / 'features'), str(folder / 'page')
  shutil.rmtree(table, ignore_errors=True)

  def say(part, **figures):
    print(
      json.dumps({'part': part} | figures | {'peak_gib': peak()}), flush=True
    )

  seconds = write(table, config.latents, config.every)
  say('write', latents=config.latents, seconds=seconds, **on_disk(table))
  say('read', **read(table, config.latents))
  shutil.rmtree(table)
  write(table, config.page, 1)
  words = [f'w{i}' for i in range(VOCABULARY)]
  start = time.perf_counter()
  index.build_index(table, {'n_latents': config.page}, words, page)
  seconds = time.perf_counter() - start
  say(
    'page',
    latents=config.page,
    seconds=seconds,
    cores=len(os.sched_getaffinity(0)),
    table=on_disk(table),
    page=on_disk(page),
  )


if __name__ == '__main__':
  flags.define(BenchmarkConfig)
  flags.define_url('workdir', 'folder in which features/ and page/ are written')
  flags.run(work, __doc__)
