"""The rows of the comparison: a finished store, as plain files and as a store.

  python -m experiments.peers.rows --store=runs/demo/store --workdir=runs/rows

Each row is centred on its own mean and brought to unit norm, once, so that
every trainer reconstructs the same targets. The files are those of `files`; the
store has the same rows, and its feed gives them in the order of the files.
"""

from collections.abc import Iterator
import dataclasses
import os

import numpy as np

from experiments.peers import files, grid
from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.cli import flags
from sae_jax.feed import from_store
from sae_jax.feed import order as order_lib
from sae_jax.storage import files as storage_files
from sae_jax.storage import records
from sae_jax.store import layout, open_store, Store, writer

# What order the feed takes, and so what every trainer is told.
WINDOW_CHUNKS, LANES = 64, 1
_ABOUT = 'about.json'
_BLOCK_ROWS = 65_536


@dataclasses.dataclass(frozen=True)
class RowsConfig(config_lib.Config):
  """Which rows."""

  site: str = config_lib.option(
    '', 'site of the store to read; may be left out if it has only one'
  )
  n_tokens: int = config_lib.option(
    1_000_000, 'most tokens that a run is trained on', least=1
  )
  batch_size: int = config_lib.option(
    grid.BATCH, 'number of tokens in a step', least=1
  )
  seeds: tuple[str, ...] = config_lib.option(
    ('0', '1'), 'seeds, each of which has an order'
  )


def unit(rows_BD: np.ndarray) -> np.ndarray:
  """Rows less their own mean, at unit norm, float32; constant rows are zero."""
  centred_BD = rows_BD.astype(np.float64)
  centred_BD -= centred_BD.mean(-1, keepdims=True)
  norm_B1 = np.linalg.norm(centred_BD, axis=-1, keepdims=True)
  return (centred_BD / np.where(norm_B1 > 0, norm_B1, 1)).astype(np.float32)


def split_rows(store: Store) -> dict[str, range]:
  """The rows of each split; no two splits share a document.

  Raises:
    UserError: if the held-out rows are of a single document, or of none.
  """
  ranges = range(store.n_train), store.validation_rows, store.test_rows
  if ranges[1] == ranges[2]:
    raise errors.UserError(
      f'store {store.url} holds out {len(ranges[2])} rows of one document or '
      'none, validation and test need one each: harvest with a larger '
      'holdout_fraction'
    )
  return dict(zip(files.SPLITS, ranges))


def write(config: RowsConfig, store_url: str, workdir: str) -> str:
  """Writes the files and the store, those that are not there.

  Args:
    config: which rows, and how many places of the orders.
    store_url: a finished store.
    workdir: a local folder.

  Returns:
    The URL of the store of these rows.

  Raises:
    UserError: if the workdir has rows of another store, or the store has too
      few documents.
  """
  source = open_store(store_url, config.site)
  made_from = {'store': source.manifest.identity, 'site': source.site}
  unit_url, path = os.path.join(workdir, 'store'), os.path.join(workdir, _ABOUT)
  os.makedirs(workdir, exist_ok=True)
  if not os.path.exists(path):
    _write_rows(source, unit_url, workdir)
    # The last one: without it rows are written again.
    storage_files.write_text(path, config_lib.to_json(made_from))
  elif about(workdir) != made_from:
    raise errors.UserError(
      f'{workdir} has rows of another store or site than {source.site} of '
      f'{source.url}: use another workdir or delete it'
    )
  store = open_store(unit_url)
  n_places = -(-config.n_tokens // config.batch_size) * config.batch_size
  for seed in map(int, config.seeds):
    path = files.order_path(workdir, seed)
    if not os.path.exists(path) or len(np.load(path)) < n_places:
      order = from_store.train_order(store, seed, WINDOW_CHUNKS, LANES)
      numbers = order_lib.batch_rows(order, 0, n_places)
      np.save(path, numbers.astype(np.int32))
  return unit_url


def about(workdir: str) -> dict[str, str]:
  """Identity of the store that a workdir's rows are from, and the site."""
  return records.read(os.path.join(workdir, _ABOUT))


def _write_rows(source: Store, unit_url: str, workdir: str) -> None:
  """Writes the store of the rows and the files of the splits."""
  plan = dataclasses.replace(
    layout.read_plan(source.url),
    sites=(source.site,),
    dtype='float32',
    config={'rows': 'less their own mean, at unit norm'},
  )
  holdout_rows = source.manifest.holdout_rows
  writer.write(unit_url, plan, _stretches(source), holdout_rows=holdout_rows)
  store = open_store(unit_url)
  for split, numbers in split_rows(store).items():
    _save(store, numbers, files.path(workdir, split))


def _stretches(source: Store) -> Iterator[tuple]:
  """A store's shards, as `writer.write` takes them."""
  stream_index = source.stream_index()
  stream = source.tokens(), source.documents(), source.positions()
  row = place = 0
  for n_rows, n_stream in source.manifest.shard_counts:
    keep = np.zeros(n_stream, bool)
    keep[stream_index[row : row + n_rows] - place] = True
    pieces = (values[place : place + n_stream] for values in stream)
    rows_RD = unit(source.finite_rows(row, row + n_rows))
    yield *pieces, keep, {source.site: rows_RD}
    row, place = row + n_rows, place + n_stream


def _save(store: Store, numbers: range, path: str) -> None:
  """Writes rows of a store as an .npy file."""
  shape = (len(numbers), store.manifest.d_model)
  out = np.lib.format.open_memmap(path, 'w+', np.float32, shape)
  for start in range(0, len(numbers), _BLOCK_ROWS):
    block = numbers[start : start + _BLOCK_ROWS]
    out[start : start + len(block)] = store.read_rows(block.start, block.stop)
  out.flush()


def main() -> None:
  """Entry point."""
  flags.define(RowsConfig)
  flags.define_url('store', 'finished store of activations')
  flags.define_url('workdir', 'local folder for the files and the store')

  def work():
    write(flags.read(RowsConfig), flags.url('store'), flags.url('workdir'))

  flags.run(work, __doc__)


if __name__ == '__main__':
  main()
