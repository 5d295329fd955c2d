"""The record of finished results: what they are made from, files' digests.

A stage writes it last. What it does not vouch for is made again by its own
stage, and named by the stage that reads it.
"""

from collections.abc import Mapping
from concurrent import futures
import hashlib
import re
from typing import Any

from etils import epath

from sae_jax import config, errors
from sae_jax.storage import files, records

NAME = 'finished.json'
_READERS = 8  # threads: a bucket's latency, not its bandwidth, is the bound
# A page of many latents has as many files.
_LONGEST = 2**30


def sha256(data: bytes) -> str:
  """The digest of a file, as the record holds it."""
  return hashlib.sha256(data).hexdigest()


def remove(folder: epath.PathLike) -> None:
  """Makes results unfinished, before a file of them changes."""
  (epath.Path(folder) / NAME).unlink(missing_ok=True)


def write(
  folder: epath.PathLike,
  made_from: Mapping[str, Any],
  digests: Mapping[str, str],
) -> None:
  """Writes the record, which makes results finished.

  Args:
    folder: local path or URL.
    made_from: all that the results depend on, as it reads back from JSON: the
      inputs, and the versions of what computes.
    digests: the name of each file, from the folder on -> `sha256`.
  """
  record = {'made_from': made_from, 'files': digests}
  files.write_text(epath.Path(folder) / NAME, config.to_json(record))


def vouches(
  folder: epath.PathLike, made_from: Mapping[str, Any], names: re.Pattern[str]
) -> bool:
  """Whether results are made from this and each file is as it was written.

  Args:
    folder: local path or URL.
    made_from: see `write`.
    names: what the files' names look like, so that no other file is looked at.
  """
  folder = epath.Path(folder)
  if not (folder / NAME).exists():
    return False
  try:
    record = records.read(folder / NAME, longest=_LONGEST)
  except errors.UserError:
    return False
  digests = record.get('files')
  if record.get('made_from') != made_from or not isinstance(digests, dict):
    return False
  if not (digests and all(map(names.fullmatch, digests))):
    return False

  def is_sound(item):
    name, digest = item
    try:
      return sha256((folder / name).read_bytes()) == digest
    except OSError:
      return False

  with futures.ThreadPoolExecutor(_READERS) as pool:
    return all(pool.map(is_sound, digests.items()))


def read(folder: epath.PathLike, name: str, stage: str) -> bytes:
  """The bytes of a file of finished results, as they were written.

  Args:
    folder: local path or URL.
    name: the file's name in the folder.
    stage: the command that writes such results, such as 'sae-probe'.

  Raises:
    UserError: if the results are not finished, or the file or the record is
      damaged.
  """
  folder = epath.Path(folder)
  remedy = f'run {stage} again'
  if not (folder / NAME).exists():
    raise errors.UserError(
      f'{folder} has no {NAME}: give the workdir of a finished {stage}, or '
      f'{remedy}'
    )
  digests = records.read(folder / NAME, remedy, _LONGEST).get('files')
  path = folder / name
  try:
    data = path.read_bytes()
  except FileNotFoundError:
    raise errors.UserError(f'{path} is not there: {remedy}') from None
  if not isinstance(digests, dict) or digests.get(name) != sha256(data):
    raise errors.UserError(
      f'{path} is not as {stage} wrote it, by its digest in {NAME}: {remedy}'
    )
  return data
