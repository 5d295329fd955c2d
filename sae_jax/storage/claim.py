"""Folders that only one process uses at a time."""

from collections.abc import Iterator
import contextlib
import fcntl
import os

from sae_jax import errors
from sae_jax.storage import url as url_lib


@contextlib.contextmanager
def claim(folder: str) -> Iterator[None]:
  """Locks a local folder for this process while the context is open.

  The kernel unlocks it when the process ends, however it ends. Folders in
  buckets cannot be locked: there this does nothing.

  Raises:
    UserError: if another process has it.
  """
  if url_lib.is_remote(folder):
    yield
    return
  os.makedirs(folder, exist_ok=True)
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise errors.UserError(
        f'{folder} is in use by another process: '
        'wait until it has ended, or use another workdir'
      ) from None
    yield
  finally:
    os.close(descriptor)
