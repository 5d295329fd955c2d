"""Tables of cells as CSV and parquet."""

from collections.abc import Sequence
import csv
import dataclasses
import hashlib
import importlib.util
import io
import math

from etils import epath

from sae_jax import errors
from sae_jax.scaling import sweep_runs
from sae_jax.scaling.cells import Cell, identity
from sae_jax.storage import files

_FIELDS = {field.name: field for field in dataclasses.fields(Cell)}
_REQUIRED = [
  name
  for name, field in _FIELDS.items()
  if field.default is dataclasses.MISSING
]
# Columns that are written for readers, and made again from the others.
_DERIVED = ('dense_flops',)


def write(cells: Sequence[Cell], path: epath.PathLike) -> None:
  """Writes a table, as parquet if its name ends in .parquet, otherwise CSV.

  Raises:
    UserError: if pyarrow is missing for parquet.
  """
  columns = {
    name: [getattr(cell, name) for cell in cells]
    for name in (*_FIELDS, *_DERIVED)
  }
  if str(path).endswith('.parquet'):
    _check_arrow(path)
    import pyarrow
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), sink)
    files.write_bytes(path, sink.getvalue())
    return
  text = io.StringIO()
  rows = csv.writer(text, lineterminator='\n')
  rows.writerow(columns)
  rows.writerows(zip(*columns.values(), strict=True))
  files.write_text(path, text.getvalue())


def read(path: epath.PathLike) -> list[Cell]:
  """Reads a table that `write` or another program wrote.

  Args:
    path: CSV, or parquet if the name ends in .parquet. Columns are named as the
      fields of `Cell`; those with a default may be absent. Or the folder of a
      sweep.

  Raises:
    UserError: if it is no such table; it names the row and the column.
  """
  path = epath.Path(path)
  if not path.exists():
    raise errors.UserError(f'there is no table {path}: check the path')
  if path.is_dir():
    # With it comes all of training, which no other table needs.
    from sae_jax.sweeps import cells as sweep_cells

    rows = sweep_runs.of_records(sweep_cells.read_cells(str(path)))
  else:
    data = path.read_bytes()
    is_parquet = path.name.endswith('.parquet')
    values = _parquet_rows(data, path) if is_parquet else _csv_rows(data, path)
    rows = [
      _cell(row, f'{path} row {number}') for number, row in enumerate(values, 1)
    ]
  _check(rows, path)
  return rows


def _check(cells: Sequence[Cell], path) -> None:
  """Raises UserError if cells make no table."""
  seen = {}
  for number, cell in enumerate(cells, 1):
    key = identity(cell)
    if key in seen:
      raise errors.UserError(
        f'{path} row {number} is the same run as row {seen[key]}: '
        'remove one of them'
      )
    seen[key] = number
  if not cells:
    raise errors.UserError(f'{path} has no rows: run cells first')
  metrics = sorted({cell.metric for cell in cells})
  if len(metrics) > 1:
    raise errors.UserError(
      f'{path} mixes losses of {" and ".join(metrics)}: keep one metric'
    )


def sha256(cells: Sequence[Cell]) -> str:
  """The digest of a table's cells, however it was written."""
  return hashlib.sha256(repr(list(cells)).encode()).hexdigest()


def has_parquet() -> bool:
  """Whether parquet can be written here."""
  return importlib.util.find_spec('pyarrow') is not None


def _check_arrow(path) -> None:
  if not has_parquet():
    raise errors.UserError(
      f'{path} needs pyarrow: pip install "sae_jax[parquet]", or use .csv'
    )


def _check_columns(names, path) -> None:
  missing = [name for name in _REQUIRED if name not in names]
  if missing:
    raise errors.UserError(
      f'{path} has no column {", ".join(missing)}: it is no table of cells'
    )
  unknown = [n for n in names if n not in _FIELDS and n not in _DERIVED]
  if unknown:
    raise errors.UserError(
      f'{path} has the unknown column {unknown[0]!r}: remove it'
    )


def _csv_rows(data: bytes, path) -> list[dict]:
  try:
    text = data.decode('utf-8-sig')
    rows = list(csv.reader(io.StringIO(text), strict=True))
  except (UnicodeDecodeError, csv.Error) as error:
    raise errors.UserError(
      f'{path} is no CSV ({errors.reason(error)}): it is damaged'
    ) from error
  names = rows[0] if rows else []
  _check_columns(names, path)
  table = []
  for number, row in enumerate(rows[1:], 1):
    if len(row) != len(names):
      raise errors.UserError(
        f'{path} row {number} has {len(row)} values for {len(names)} columns: '
        'it is damaged'
      )
    table.append(dict(zip(names, row, strict=True)))
  return table


def _parquet_rows(data: bytes, path) -> list[dict]:
  _check_arrow(path)
  import pyarrow
  from pyarrow import parquet

  try:
    table = parquet.read_table(io.BytesIO(data))
  except (pyarrow.ArrowException, OSError) as error:
    raise errors.UserError(
      f'{path} is no parquet file ({errors.reason(error)}): it is damaged'
    ) from error
  _check_columns(table.column_names, path)
  return table.to_pylist()


def _cell(row: dict, where: str) -> Cell:
  values = {}
  for name, value in row.items():
    if name in _DERIVED:
      continue
    field = _FIELDS[name]
    if value in ('', None) and name not in _REQUIRED:
      values[name] = field.default
      continue
    try:
      values[name] = _converted(field.type, value)
    except (TypeError, ValueError, OverflowError):
      raise errors.UserError(
        f'{where}: {name} is {value!r}, not of the type {field.type.__name__}'
      ) from None
  try:
    return Cell(**values)
  except errors.UserError as error:
    raise errors.UserError(f'{where}: {error}') from error


def _converted(kind: type, value):
  """A value of a table as a type; an integer may be written 1e6."""
  if kind is not int:
    return kind(value)
  if isinstance(value, str) and value.lstrip('-').isdecimal():
    return int(value)
  number = float(value)
  if not math.isfinite(number) or number != int(number):
    raise ValueError(value)
  return int(number)
