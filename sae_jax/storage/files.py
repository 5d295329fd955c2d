"""Small files under a URL: each is written whole or not at all."""

import contextlib
import os
import re

from etils import epath
import tensorstore as ts

from sae_jax import errors
from sae_jax.storage import locks
from sae_jax.storage import url as url_lib


def write_bytes(path: epath.PathLike, data: bytes) -> None:
  """Writes a file so that a reader sees the old or the new one, never a part.

  Args:
    path: local path or URL; missing folders are made.
    data: the file's content.

  Raises:
    OSError: if it cannot be written.
  """
  path = epath.Path(path)
  if url_lib.is_remote(path):
    try:
      # An object needs no folder, and appears when its upload is complete.
      path.write_bytes(data)
    except Exception as error:
      # Clients of buckets raise errors of many types, which name other URLs.
      raise OSError(f'cannot write {path}: {errors.reason(error)}') from error
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.parent / f'.{path.name}.{os.getpid()}.partial'
  try:
    partial.write_bytes(data)
    partial.replace(path)
  except OSError as error:
    # A full disk needs the room. There may be no such file, if it could not
    # even be opened.
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
    # An error of a write names no file.
    error.filename = os.fspath(path)
    raise


_PARTIAL = re.compile(r'\..+\.\d+\.partial')


def remove_partial(folder: epath.PathLike) -> None:
  """Removes what killed processes left of files that they wrote to a folder.

  Args:
    folder: local path or URL; no other process may write there now.
  """
  folder = epath.Path(folder)
  # In buckets there are none.
  if url_lib.is_remote(folder) or not folder.exists():
    return
  for path in folder.iterdir():
    if _PARTIAL.fullmatch(path.name):
      path.unlink(missing_ok=True)


def write_text(path: epath.PathLike, text: str) -> None:
  """`write_bytes` of UTF-8 text."""
  write_bytes(path, text.encode())


def folder(url: str) -> ts.KvStore:
  """A folder, to be written to by `create`.

  Raises:
    UserError: if its kind of storage is not known.
    ValueError: if it cannot be opened.
  """
  return ts.KvStore.open(locks.without(url_lib.kvstore(url))).result()


# TensorStore's generation of an absent object.
ABSENT = b'\x02'


def create(files: ts.KvStore, name: str, data: bytes) -> bool:
  """Writes an object in one piece unless it is there.

  Args:
    files: the `folder`.
    name: the object.
    data: its bytes.

  Returns:
    Whether the object holds these bytes now: False if it held others, which
    are left as they are.

  Raises:
    ValueError: if it cannot be written.
  """
  if files.write(name, data, if_equal=ABSENT).result().generation:
    return True
  # It may be ours, if the server's answer was lost, or that of another process
  # that does the same work.
  stored = files.read(name).result()
  if stored.state == 'missing':
    # TensorStore takes S3's 404 of a bucket for that of an object.
    raise ValueError(
      f'{name} was not written and is not there: check that the bucket exists'
    )
  return stored.value == data
