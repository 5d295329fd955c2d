"""Folders that only one process uses at a time."""

from collections.abc import Iterator
import contextlib
import fcntl
import os

from sae_jax import errors
from sae_jax.storage import locks
from sae_jax.storage import url as url_lib


@contextlib.contextmanager
def claim(folder: str, shared: bool = False) -> Iterator[None]:
  """Locks a local folder for this process while the context is open.

  The kernel unlocks it when the process ends, however it ends. Folders in
  buckets cannot be locked: there this does nothing, nor where a file system has
  no locks, of which it warns.

  Args:
    folder: local path or URL; a local one is made.
    shared: whether other processes may claim it too, if they share it.

  Raises:
    UserError: if another process has it.
  """
  if url_lib.is_remote(folder):
    yield
    return
  os.makedirs(folder, exist_ok=True)
  # Asked before any work, so that the warning comes first.
  lockless = locks.are_missing(folder)
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    try:
      kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
      fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
      raise errors.UserError(
        f'{folder} is in use by another process: '
        'wait until it has ended, or use another folder'
      ) from None
    except OSError:
      if not lockless:
        raise
    yield
  finally:
    os.close(descriptor)
