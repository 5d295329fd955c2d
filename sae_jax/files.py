"""Small files under a URL: whole or absent; folders: one user at a time."""

from collections.abc import Iterator
import contextlib
import fcntl
import os

from etils import epath

from sae_jax import config as config_lib


def write_bytes(path: epath.PathLike, data: bytes) -> None:
  """Writes a file so that a reader sees the old or the new one, never a part.

  Args:
    path: local path or gs:// URL; missing folders are made.
    data: the file's content.

  Raises:
    OSError: if it cannot be written.
  """
  path = epath.Path(path)
  if '://' in os.fspath(path):
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      # An object appears in the bucket when its upload is complete.
      path.write_bytes(data)
    except Exception as error:
      # Clients of buckets raise what they like, and name another URL.
      raise OSError(
        f'cannot write {path}: {config_lib.reason(error)}'
      ) from error
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


def absolute(path: str) -> str:
  """A local path from the root; a URL as it is."""
  return path if '://' in path else os.path.abspath(path)


@contextlib.contextmanager
def claim(folder: str) -> Iterator[None]:
  """Keeps a local folder for this process while the context is open.

  The kernel lets go of it when the process ends, however it ends. Folders in
  gs:// cannot be kept.

  Raises:
    UserError: if another process has it.
  """
  if folder.startswith('gs://'):
    yield
    return
  os.makedirs(folder, exist_ok=True)
  held = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise config_lib.UserError(
        f'{folder} is in use by another process: '
        'wait until it has ended, or use another workdir'
      ) from None
    yield
  finally:
    os.close(held)
