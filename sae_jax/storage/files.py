"""Files under a URL: each is written whole or not at all."""

from collections.abc import Callable
import contextlib
import os
import re
import shutil
import tempfile
from typing import BinaryIO

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


def write_stream(
  path: epath.PathLike, write: Callable[[BinaryIO], None]
) -> None:
  """`write_bytes` of more than there is memory for.

  Args:
    path: local path or URL; missing folders are made.
    write: writes the content to a file, in which it can go back.

  Raises:
    OSError: if it cannot be written.
  """
  path = epath.Path(path)
  if url_lib.is_remote(path):
    # A bucket's client would keep what was written before an error.
    with tempfile.TemporaryFile() as copy:
      write(copy)
      copy.seek(0)
      try:
        with path.open('wb') as file:
          shutil.copyfileobj(copy, file, 1 << 24)
      except Exception as error:
        raise OSError(f'cannot write {path}: {errors.reason(error)}') from error
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.parent / f'.{path.name}.{os.getpid()}.partial'
  try:
    with partial.open('wb') as file:
      write(file)
    partial.replace(path)
  except BaseException as error:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
    if isinstance(error, OSError):
      error.filename = os.fspath(path)
    raise


def is_file(path: epath.PathLike) -> bool:
  """Whether a file is there: no folder, and no pipe or device.

  Reading a pipe or a device may never end. Links are followed.
  """
  path = epath.Path(path)
  if url_lib.is_remote(path):
    return path.is_file()
  return os.path.isfile(path)


def size(path: epath.PathLike, what: str) -> int:
  """The bytes of a file that is to be read.

  Args:
    path: local path or URL.
    what: what it should be, for the error.

  Raises:
    UserError: if nothing is there, or a folder or a device, or it cannot be
      read, or see `url.backend`.
  """
  url_lib.backend(path)
  try:
    if not is_file(path):
      if epath.Path(path).is_dir():
        raise errors.UserError(f'{path} is a folder: give the path of {what}')
      raise errors.UserError(f'no file at {path}: give the path of {what}')
    with epath.Path(path).open('rb') as file:
      n_bytes = file.seek(0, os.SEEK_END)
  except errors.UserError:
    raise
  except Exception as error:
    # Clients of buckets raise errors of many types; a path may hold a NUL.
    raise errors.UserError(
      f'{path} cannot be read ({errors.reason(error)}): give the path of {what}'
    ) from error
  return n_bytes


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
