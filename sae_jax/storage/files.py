"""Small files under a URL, whole or absent."""

import contextlib
import os

from etils import epath
import tensorstore as ts

from sae_jax import errors
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
      # It needs no folder, and appears in the bucket when its upload is
      # complete.
      path.write_bytes(data)
    except Exception as error:
      # Clients of buckets raise what they like, and name another URL.
      raise OSError(f'cannot write {path}: {errors.reason(error)}') from error
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.parent / f'.{path.name}.{os.getpid()}.partial'
  try:
    partial.write_bytes(data)
    partial.replace(path)
  except OSError as error:
    # A full disk needs the room; where nothing can be written none is there.
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
    # What a write raises names no file.
    error.filename = os.fspath(path)
    raise


def write_text(path: epath.PathLike, text: str) -> None:
  """`write_bytes` of UTF-8 text."""
  write_bytes(path, text.encode())


# TensorStore's generation of what is not there.
_NOTHING = b'\x02'


def create(files: ts.KvStore, name: str, data: bytes) -> bool:
  """Writes what is not there yet, in one piece.

  Args:
    files: the store's folder.
    name: the object.
    data: its bytes.

  Returns:
    Whether the object holds these bytes now: False if it has others, which
    stay as they are.

  Raises:
    ValueError: if it cannot be written.
  """
  if files.write(name, data, if_equal=_NOTHING).result().generation:
    return True
  # Ours, if an answer was lost, or another's who does the same work.
  there = files.read(name).result()
  if there.state == 'missing':
    # TensorStore takes S3's 404 for that of an object.
    raise ValueError(f'{name} is not written and not there: is the bucket?')
  return there.value == data
