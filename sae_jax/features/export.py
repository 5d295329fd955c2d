"""The feature table as one file for other programs: CSV or Parquet."""

from collections.abc import Iterator
import csv
import importlib.util
import io
import math

from etils import epath
import numpy as np

from sae_jax import errors
from sae_jax.features.reader import Features
from sae_jax.storage import files

KINDS = ('.csv', '.parquet')


def export(features: Features, path: str) -> None:
  """Writes a line for each latent, whole or not at all.

  CSV has the columns with one number for each latent, and an empty field where
  there is none; Parquet those with a few numbers too, such as the tokens that a
  latent votes for, as lists. Windows of text and histograms are in neither.

  Args:
    features: the table.
    path: ends in .csv or .parquet; local path or URL.

  Raises:
    UserError: if it ends otherwise, cannot be written, or pyarrow is missing
      for Parquet.
  """
  kind = epath.Path(path).suffix
  check(path)
  try:
    data = _csv(features) if kind == '.csv' else _parquet(features)
    files.write_bytes(path, data)
  except OSError as error:
    raise errors.UserError(
      f'cannot write {path}: {errors.reason(error)}: check the path and free '
      'space'
    ) from error


def check(path: str) -> None:
  """Raises UserError unless `export` can write such a file."""
  kind = epath.Path(path).suffix
  if kind not in KINDS:
    raise errors.UserError(
      f'{path} does not end in {" or ".join(KINDS)}: give one that does'
    )
  if kind == '.parquet' and importlib.util.find_spec('pyarrow') is None:
    raise errors.UserError(
      f'{path} needs pyarrow: pip install "sae_jax[parquet]", or use .csv'
    )


def _names(features: Features, axes: int) -> list[str]:
  """Columns with so many axes but N, at most, and no histogram or window."""
  return [
    name
    for name, column in features.columns.items()
    if not column.is_shared
    and len(column.axes) <= 1 + axes
    and not {'H', 'W'} & set(column.axes)
  ]


def _blocks(features: Features, names) -> Iterator[dict[str, np.ndarray]]:
  for start in range(0, features.n_latents, features.shard_latents):
    stop = min(start + features.shard_latents, features.n_latents)
    yield features.latents(start, stop, names)


def _csv(features: Features) -> bytes:
  names = _names(features, 0)
  with io.StringIO(newline='') as file:
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(names)
    for block in _blocks(features, names):
      columns = [map(_field, block[name].tolist()) for name in names]
      writer.writerows(zip(*columns))
    return file.getvalue().encode()


def _field(value: float) -> float | str:
  return value if math.isfinite(value) else ''


def _parquet(features: Features) -> bytes:
  import pyarrow
  from pyarrow import parquet

  names = _names(features, 1)
  with io.BytesIO() as file:
    writer = None
    for block in _blocks(features, names):
      table = pyarrow.table({name: _array(block[name]) for name in names})
      writer = writer or parquet.ParquetWriter(file, table.schema)
      writer.write_table(table)
    writer.close()
    return file.getvalue()


def _array(of_NX: np.ndarray):
  """A column; where it has two axes, of lists."""
  import pyarrow

  if of_NX.ndim == 1:
    # No number is null, as in CSV.
    missing = ~np.isfinite(of_NX) if of_NX.dtype.kind == 'f' else None
    return pyarrow.array(of_NX, mask=missing)
  return pyarrow.FixedSizeListArray.from_arrays(
    pyarrow.array(of_NX.reshape(-1)), of_NX.shape[1]
  )
