"""delphi's latent cache: where latents are active in a text, and how strongly.

`LATENTS/SITE/` has the text and the activations of a range of latents in each
of its files, FIRST_LAST.safetensors:

  tokens       [rows, context] int64, the text
  locations    [activations, 3] uint16, or uint32 where that is too small: row,
               place in the row, and latent less the first of the file
  activations  [activations] float16

and config.json, without which it is not read. The text is the store's, masked
tokens too, on which no latent is active; a row ends where it is full, whatever
the document, as in delphi's own.
"""

import bisect
from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import functools
import itertools
import pathlib
import shutil
import tempfile

from etils import epath
import numpy as np

import sae_jax
from sae_jax import autoencoder, checkpoint, errors, progress
from sae_jax import config as config_lib
from sae_jax import store as store_lib
from sae_jax.dashboards.config import DashboardConfig
from sae_jax.features import results
from sae_jax.probing import data as data_lib
from sae_jax.storage import files, safetensors, tensors, workdir
from sae_jax.storage import url as url_lib

# Tokens of a row: delphi's own default, a multiple of its windows of 32.
CONTEXT = 256
# Its default. With more latents in a file their numbers need 32 bits.
_LEAST_FILES, _MOST_LATENTS = 5, 2**16
# Of no more than this delphi takes an activation for none.
_NONE = 1e-5
_LAST, _SCRATCH = 'config.json', '.activations'
# Activations, zeros among them, that are encoded at a time.
_ENCODED = 2**26


@dataclasses.dataclass(frozen=True)
class LatentCache:
  """What was written.

  Attributes:
    folder: where it is.
    tokens: how many tokens its text has.
    activations: how many activations it has.
  """

  folder: str
  tokens: int
  activations: int


@dataclasses.dataclass(frozen=True)
class _Text:
  """A part of a store's text.

  Attributes:
    first: the first token's number in the stream.
    tokens_L: the tokens, a multiple of the context's.
    rows: the store's rows that they have.
  """

  first: int
  tokens_L: np.ndarray
  rows: range


def write(
  config: DashboardConfig,
  probe_url: str,
  checkpoint_url: str,
  store_url: str,
  out: str,
  batch_rows: int = 4096,
  context: int = CONTEXT,
) -> LatentCache:
  """Encodes the end of a store's text into `OUT/latents/SITE/`.

  Beside the autoencoder there are a batch of rows and the tokens in memory;
  what is to be written waits in temporary files.

  Args:
    config: options.
    probe_url: the workdir of sae-probe; local path or URL, as all.
    checkpoint_url: the workdir of the training run that was probed.
    store_url: the store that was probed.
    out: the folder of delphi's results.
    batch_rows: rows that are encoded at a time, at most.
    context: tokens of a row of the text.

  Raises:
    UserError: if the results are not of this autoencoder and store, an
      activation is beyond float16, or there is a cache already, or one of
      other results is begun.
  """
  report = results.read_report(probe_url)
  features = results.open_features(probe_url, report)
  _check_range(float(np.nanmax(features.column('max'), initial=0)))
  folder = str(epath.Path(out) / 'latents' / report['site'])
  made_from = config_lib.through_json(
    {
      'probe': report['made_from'],
      'tokens': config.delphi_tokens,
      'context': context,
      'sae_jax': sae_jax.__version__,
    }
  )
  with workdir.hold(folder, results.STAGE, made_from):
    if (epath.Path(folder) / _LAST).exists():
      raise errors.UserError(
        f'{folder} is a whole cache already: write to another folder, or '
        'delete it'
      )
    trained, store = data_lib.of_results(
      checkpoint_url, store_url, report, probe_url
    )
    text = _text(store, config.delphi_tokens, context)
    workdir.sign(folder, results.STAGE, made_from)
    files.remove_partial(folder)
    starts = _starts(trained.config.n_latents)
    with _scratch(folder) as scratch:
      splits = _Splits(starts, len(text.tokens_L) // context, context, scratch)
      for rows, codes in _encoded(trained, store, text, batch_rows):
        splits.add(rows, *codes)
      for number, (first, stop) in enumerate(itertools.pairwise(starts)):
        safetensors.write(
          epath.Path(folder) / f'{first}_{stop - 1}.safetensors',
          splits.content(number, text.tokens_L),
        )
    record = {
      'dataset_repo': ','.join(store.manifest.sources),
      'cache_ctx_len': context,
      'n_tokens': len(text.tokens_L),
      'n_splits': len(starts) - 1,
      'model_name': report['subject'],
    }
    files.write_text(epath.Path(folder) / _LAST, config_lib.to_json(record))
  return LatentCache(folder, len(text.tokens_L), sum(splits.counts))


@contextlib.contextmanager
def _scratch(folder: str) -> Iterator[pathlib.Path]:
  """A local folder, in this one if it is local.

  There the same command removes what a killed one has left.
  """
  if url_lib.is_remote(folder):
    with tempfile.TemporaryDirectory() as scratch:
      yield pathlib.Path(scratch)
    return
  scratch = pathlib.Path(folder) / _SCRATCH
  shutil.rmtree(scratch, ignore_errors=True)
  scratch.mkdir()
  try:
    yield scratch
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def _check_range(most: float) -> None:
  """Raises UserError for an activation that float16 cannot hold."""
  if most > float(np.finfo(np.float16).max):
    raise errors.UserError(
      f'an activation is {most:.6g}, beyond the float16 of a latent cache: '
      'train with a preprocessing that scales activations'
    )


def _starts(n_latents: int) -> list[int]:
  """The first latent of each file, and their number."""
  n_files = max(_LEAST_FILES, -(-n_latents // _MOST_LATENTS))
  n_files = min(n_files, n_latents)
  return [number * n_latents // n_files for number in range(n_files + 1)]


def _text(store: store_lib.Store, most_tokens: int, context: int) -> _Text:
  """The end of a store's text, from the beginning of one of its contexts."""
  n_stream, n_rows = store.manifest.n_stream, store.manifest.n_rows
  first = max(0, n_stream - most_tokens)
  tokens_L, _, position_L = store.stream(first, n_stream)
  begins = np.flatnonzero(position_L == 0)[:1]
  skipped = int(begins[0]) if len(begins) else len(tokens_L)
  tokens_L = tokens_L[skipped:]
  tokens_L = tokens_L[: len(tokens_L) // context * context]
  if not len(tokens_L):
    raise errors.UserError(
      f'delphi_tokens {most_tokens} are no {context} tokens from the beginning '
      f'of a context on, of the {n_stream:,} of store {store.url}: give more, '
      'or harvest more'
    )
  first += skipped
  # Read by one: the index of a whole store may not fit into memory.
  place = functools.partial(_place, store)
  start, stop = (
    bisect.bisect_left(range(n_rows), end, key=place)
    for end in (first, first + len(tokens_L))
  )
  return _Text(first, tokens_L, range(start, stop))


def _place(store: store_lib.Store, row: int) -> int:
  """The number of a row's token in the stream."""
  return int(store.stream_index(row, row + 1)[0])


def _encoded(
  trained: checkpoint.Trained,
  store: store_lib.Store,
  text: _Text,
  batch_rows: int,
) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]]:
  """Place in the text, values and latents of rows that follow each other."""
  # Where any number of latents may be active all of them are encoded.
  size = max(1, min(batch_rows, _ENCODED // trained.config.n_latents))
  with progress.bar(total=len(text.rows), unit='tok', desc='delphi') as bar:
    for start in text.rows[::size]:
      stop = min(start + size, text.rows.stop)
      rows_RX = store.finite_rows(start, stop)
      raw_RD, _ = autoencoder.halves(trained.config, rows_RX)
      codes = trained.encode(raw_RD)
      place_R = store.stream_index(start, stop) - text.first
      yield place_R, (np.asarray(codes.values), np.asarray(codes.indices))
      bar.update(stop - start)


class _Splits:
  """The activations of each file, on disk until they are all there.

  Attributes:
    counts: how many activations each file has.
  """

  def __init__(
    self, starts: list[int], n_rows: int, context: int, folder: pathlib.Path
  ):
    widest = max(stop - first for first, stop in itertools.pairwise(starts))
    most = max(widest, n_rows, context)
    kind = '<u2' if most <= 2**16 else '<u4'
    self._dtype = np.dtype([('location', kind, 3), ('activation', '<f2')])
    self._starts, self._context = np.array(starts), context
    self._folder, self.counts = folder, [0] * (len(starts) - 1)

  def add(
    self, place_R: np.ndarray, vals_RK: np.ndarray, idx_RK: np.ndarray
  ) -> None:
    """Adds the codes of rows, whose places in the text ascend."""
    order_RK = np.argsort(idx_RK, 1, 'stable')
    vals_RK = np.take_along_axis(vals_RK, order_RK, 1)
    idx_RK = np.take_along_axis(idx_RK, order_RK, 1)
    row, column = np.nonzero(vals_RK > _NONE)
    values, latents = vals_RK[row, column], idx_RK[row, column]
    _check_range(float(values.max(initial=0)))
    number = np.searchsorted(self._starts, latents, 'right') - 1
    records = np.empty(len(values), self._dtype)
    locations = records['location']
    locations[:, 0], locations[:, 1] = np.divmod(place_R[row], self._context)
    locations[:, 2] = latents - self._starts[number]
    records['activation'] = values
    # As delphi has them: by place in the text, then by latent.
    records = records[np.argsort(number, kind='stable')]
    counts = np.bincount(number, minlength=len(self.counts)).tolist()
    start = 0
    for split, count in enumerate(counts):
      if count:
        with self._path(split).open('ab') as file:
          file.write(tensors.as_bytes(records[start : start + count]))
      start += count
      self.counts[split] += count

  def content(
    self, split: int, tokens_L: np.ndarray
  ) -> Mapping[str, tensors.Tensor]:
    """The tensors of a file."""
    tokens_RC = tokens_L.reshape(-1, self._context)
    count, at = self.counts[split], self._dtype['location'].base

    def tokens(ranges):
      return tokens_RC[tuple(slice(*one) for one in ranges)].astype('<i8')

    return {
      'locations': tensors.Tensor(
        (count, 3), at, functools.partial(self._part, split, 'location')
      ),
      'activations': tensors.Tensor(
        (count,),
        np.dtype('<f2'),
        functools.partial(self._part, split, 'activation'),
      ),
      'tokens': tensors.Tensor(tokens_RC.shape, np.dtype('<i8'), tokens),
    }

  def _part(self, split: int, name: str, ranges: tensors.Ranges) -> np.ndarray:
    (start, stop), *rest = ranges
    if start == stop:
      return np.empty((0, *(b - a for a, b in rest)), self._dtype[name].base)
    offset = start * self._dtype.itemsize
    with self._path(split).open('rb') as file:
      records = np.fromfile(file, self._dtype, stop - start, offset=offset)
    return records[name][(slice(None), *(slice(*one) for one in rest))]

  def _path(self, split: int) -> pathlib.Path:
    return self._folder / str(split)
