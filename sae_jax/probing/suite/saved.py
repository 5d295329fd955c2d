"""Results of evaluations in a workdir: whole or absent, and read again."""

from collections.abc import Mapping
import dataclasses
import io
from typing import Any

from etils import epath
import numpy as np

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.probing.suite.figures import Sample
from sae_jax.storage import files, finished, records

# In a workdir of sae-probe.
FOLDER = 'evaluations'
# Between the name of an autoencoder and that of a term; in neither of them.
_BETWEEN = '\t'


@dataclasses.dataclass(frozen=True)
class Result:
  """An evaluation's result.

  Attributes:
    record: what the report says of it, as JSON has it.
    samples: sums over units by what is scored; none where it could not be
      measured.
    columns: columns of the feature table, see `outcome.Outcome`.
  """

  record: dict[str, Any]
  samples: dict[str, Sample]
  columns: dict[str, np.ndarray]


def paths(workdir: epath.PathLike, name: str) -> tuple[epath.Path, epath.Path]:
  """The record and the arrays of an evaluation."""
  folder = epath.Path(workdir) / FOLDER
  return folder / f'{name}.json', folder / f'{name}.npz'


def write(
  workdir: epath.PathLike,
  name: str,
  made_from: Mapping[str, Any],
  result: Result,
) -> None:
  """Writes a result; its record last, with the digest of its arrays.

  Args:
    workdir: local path or URL.
    name: of the evaluation.
    made_from: all that it depends on, as it reads back from JSON.
    result: the result.
  """
  record_path, arrays_path = paths(workdir, name)
  arrays = {f'column {n}': of for n, of in result.columns.items()}
  for who, sample in result.samples.items():
    own = {'unit': sample.unit_U, 'draw': sample.draw_U}
    own |= {f'sum of {term}': of for term, of in sample.sums.items()}
    arrays |= {f'{who}{_BETWEEN}{key}': of for key, of in own.items()}
  with io.BytesIO() as file:
    np.savez(file, **arrays)
    data = file.getvalue()
  files.write_bytes(arrays_path, data)
  record = {
    'made_from': made_from,
    'arrays': finished.sha256(data),
    'result': result.record,
  }
  files.write_text(record_path, config_lib.to_json(record))


def read(
  workdir: epath.PathLike, name: str, made_from: Mapping[str, Any] | None
) -> Result | None:
  """A result that is there, undamaged and made from this; else None.

  Args:
    workdir: local path or URL.
    name: of the evaluation.
    made_from: see `write`; None for whatever it was made from.
  """
  record_path, arrays_path = paths(workdir, name)
  if not record_path.exists():
    return None
  try:
    record = records.read(record_path)
    data = arrays_path.read_bytes()
    if made_from not in (None, record['made_from']):
      return None
    if finished.sha256(data) != record['arrays']:
      return None
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
      arrays = dict(arrays)
    return Result(record['result'], _samples(arrays), _of(arrays, 'column '))
  except (errors.UserError, OSError, KeyError, ValueError):
    return None


def _of(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
  return {
    key.removeprefix(prefix): of
    for key, of in arrays.items()
    if key.startswith(prefix)
  }


def _samples(arrays: Mapping[str, np.ndarray]) -> dict[str, Sample]:
  by_name = {}
  for key, of in arrays.items():
    who, between, part = key.rpartition(_BETWEEN)
    if between:
      by_name.setdefault(who, {})[part] = of
  return {
    who: Sample(own['unit'], own['draw'], _of(own, 'sum of '))
    for who, own in by_name.items()
  }
