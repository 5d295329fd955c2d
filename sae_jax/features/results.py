"""The finished results of probing: a report and a feature table."""

from collections.abc import Mapping
import re
from typing import Any

from etils import epath
import numpy as np

from sae_jax import config, errors
from sae_jax.features import table as table_lib
from sae_jax.storage import files, finished, records

STAGE = 'sae-probe'
REPORT, FEATURES = 'report.json', 'features.npz'
_NAMES = re.compile(r'report\.json|features\.npz')


def write(
  workdir: epath.PathLike,
  made_from: Mapping[str, Any],
  report: dict[str, Any],
  table: dict[str, np.ndarray],
) -> None:
  """Writes report.json and features.npz, and last the record of the two.

  Args:
    workdir: local path or URL.
    made_from: all that they depend on, as it reads back from JSON.
    report: values that JSON has.
    table: the feature table.
  """
  finished.remove(workdir)
  contents = {
    FEATURES: table_lib.to_bytes(table),
    REPORT: config.to_json(report).encode(),
  }
  for name, data in contents.items():
    files.write_bytes(epath.Path(workdir) / name, data)
  digests = {name: finished.sha256(data) for name, data in contents.items()}
  finished.write(workdir, made_from, digests)


def are_finished(workdir: epath.PathLike, made_from: Mapping[str, Any]) -> bool:
  """Whether the results are there, undamaged and made from this."""
  return finished.vouches(workdir, made_from, _NAMES)


def read_report(workdir: epath.PathLike) -> dict[str, Any]:
  """The report of finished results.

  Raises:
    UserError: if they are not finished, or it is damaged or does not say of
      which subject and of how many latents it is.
  """
  data = finished.read(workdir, REPORT, STAGE)
  name = str(epath.Path(workdir) / REPORT)
  report = records.parse(data, name, f'run {STAGE} again')
  for key, kind in (('subject', str), ('n_latents', int)):
    if type(report.get(key)) is not kind:
      raise errors.UserError(
        f'{name} gives {report.get(key)!r} as {key}: run {STAGE} again'
      )
  return report


def read_features(
  workdir: epath.PathLike, report: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """The feature table of finished results.

  Args:
    workdir: local path or URL.
    report: their report, from `read_report`.

  Raises:
    UserError: if they are not finished, or it is damaged or not as declared.
  """
  data = finished.read(workdir, FEATURES, STAGE)
  name = str(epath.Path(workdir) / FEATURES)
  return table_lib.parse(data, name, report['n_latents'])
