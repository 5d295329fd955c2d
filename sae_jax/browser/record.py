"""The record of a finished page: its inputs and its files' digests."""

from concurrent import futures
import hashlib
import json
import re
from typing import Any

from etils import epath

from sae_jax import errors
from sae_jax.storage import files, records

_PATH = 'data/record.json'
# What a build writes, so that no other file is looked at.
_NAME = re.compile(r'(data/(features/)?)?\w+\.(html|js|css|svg|json)')
_READERS = 8  # threads: a bucket's latency, not its bandwidth, is the bound
_LONGEST = 2**30


def sha256(data: bytes) -> str:
  """The digest of a file, as the record holds it."""
  return hashlib.sha256(data).hexdigest()


def write(
  out: epath.Path, inputs: dict[str, Any], digests: dict[str, str]
) -> None:
  """Writes the record, which makes a page a finished one.

  Args:
    out: the page's folder.
    inputs: everything that the page depends on, as it reads back from JSON.
    digests: the name of each file of the page, from its folder on -> `sha256`.
  """
  # Sorted, as threads write the files in any order.
  record = {'inputs': inputs, 'files': dict(sorted(digests.items()))}
  text = json.dumps(record, indent=0)
  files.write_text(out / _PATH, text)


def remove(out: epath.Path) -> None:
  """Makes a page an unfinished one."""
  (out / _PATH).unlink(missing_ok=True)


def vouches(out_url: epath.PathLike, inputs: dict[str, Any]) -> bool:
  """Whether a finished page is made from this and each file is as written."""
  out = epath.Path(out_url)
  if not (out / _PATH).exists():
    return False
  try:
    record = records.read(out / _PATH, longest=_LONGEST)
  except errors.UserError:
    return False
  digests = record.get('files')
  if record.get('inputs') != inputs or not isinstance(digests, dict):
    return False
  if not (digests and all(map(_NAME.fullmatch, digests))):
    return False

  def is_sound(item):
    name, digest = item
    try:
      return sha256((out / name).read_bytes()) == digest
    except OSError:
      return False

  with futures.ThreadPoolExecutor(_READERS) as pool:
    return all(pool.map(is_sound, digests.items()))
