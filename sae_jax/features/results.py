"""The finished results of probing: a report and a feature table."""

from collections.abc import Mapping
import re
from typing import Any

from etils import epath

from sae_jax import config, errors
from sae_jax.features import manifest as manifest_lib
from sae_jax.features import reader, writer
from sae_jax.features.reader import Features
from sae_jax.storage import files, finished, records

STAGE = 'sae-probe'
REPORT, FEATURES, PAGE = 'report.json', 'features', 'report.html'
# It vouches for all other objects of the table.
_MANIFEST = f'{FEATURES}/{manifest_lib.NAME}'
_NAMES = re.compile(r'report\.(json|html)|features/manifest\.json')
# What the table that is begun is made from.
_BEGUN = 'begun.json'
# What a table was in earlier versions.
_EARLIER = 'features.npz'


def features_url(workdir: epath.PathLike) -> str:
  """The folder of the feature table in a workdir of sae-probe."""
  return str(epath.Path(workdir) / FEATURES)


def begin(workdir: epath.PathLike, made_from: Mapping[str, Any]) -> None:
  """Makes a workdir ready for results; by one process, before any writes.

  What was begun of the same results stays, as equal shards are written once;
  what is finished and damaged, or of another version, is removed.

  Args:
    workdir: local path or URL.
    made_from: all that the table's bytes depend on, as it reads back from
      JSON: what `write` is given, and what rounding depends on.

  Raises:
    OSError: if it cannot be written.
  """
  folder = epath.Path(workdir)
  record = config.to_json({'made_from': made_from}).encode()
  begun = folder / FEATURES / _BEGUN
  is_same = begun.exists() and begun.read_bytes() == record
  if is_same and not (folder / finished.NAME).exists():
    return
  writer.clear(features_url(workdir))
  (folder / _EARLIER).unlink(missing_ok=True)
  # Last: a table that nothing vouches for would pass for one that was begun.
  finished.remove(workdir)
  files.write_bytes(begun, record)


def write(
  workdir: epath.PathLike,
  made_from: Mapping[str, Any],
  report: dict[str, Any],
  pages: Mapping[str, bytes] | None = None,
) -> None:
  """Writes report.json and pages, and last the record of all results.

  Args:
    workdir: local path or URL, where the table is sealed.
    made_from: all that they depend on, as it reads back from JSON.
    report: values that JSON has.
    pages: the report for people by its file's name, or none.
  """
  finished.remove(workdir)
  folder, pages = epath.Path(workdir), pages or {}
  data = config.to_json(report).encode()
  for name, page in ({REPORT: data} | dict(pages)).items():
    files.write_bytes(folder / name, page)
  manifest = (folder / _MANIFEST).read_bytes()
  contents = {REPORT: data, **pages, _MANIFEST: manifest}
  digests = {name: finished.sha256(data) for name, data in contents.items()}
  finished.write(workdir, made_from, digests)


def are_finished(workdir: epath.PathLike, made_from: Mapping[str, Any]) -> bool:
  """Whether the results are there, undamaged and made from this."""
  if not finished.vouches(workdir, made_from, _NAMES):
    return False
  try:
    reader.open_features(features_url(workdir)).verify()
  except errors.UserError:
    return False
  return True


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


def open_features(
  workdir: epath.PathLike,
  report: Mapping[str, Any],
  vocabulary_size: int | None = None,
) -> Features:
  """The feature table of finished results.

  Args:
    workdir: local path or URL.
    report: their report, from `read_report`.
    vocabulary_size: see `reader.open_features`.

  Raises:
    UserError: if they are not finished, or its manifest is damaged or of other
      latents than the report.
  """
  url = features_url(workdir)
  try:
    data = finished.read(workdir, _MANIFEST, STAGE)
  except errors.UserError:
    reader.refuse_npz(url)
    raise
  name = str(epath.Path(workdir) / _MANIFEST)
  manifest = manifest_lib.parse(data, name)
  if manifest.n_latents != report['n_latents']:
    raise errors.UserError(
      f'{name} is of {manifest.n_latents:,} latents, the report of '
      f'{report["n_latents"]:,}: run {STAGE} again'
    )
  return Features(url, manifest, vocabulary_size)
