"""File systems without locks, such as Lustre that is mounted without them."""

import fcntl
import os
import tempfile
from typing import Any, IO

from absl import logging

# Whether locks are missing, by the number of a file system.
_known: dict[int, bool] = {}


def are_missing(folder: str) -> bool:
  """Whether files in a local folder cannot be locked.

  What writes there must then do without, and two processes that use the folder
  at once are not kept apart; a warning says so, once for each file system. Of a
  folder where no file can be made this says nothing: writing there fails.

  Args:
    folder: local path; it need not exist.
  """
  folder = os.path.abspath(folder)
  while not os.path.isdir(folder) and folder != os.path.dirname(folder):
    folder = os.path.dirname(folder)
  try:
    number = os.stat(folder).st_dev
    if number not in _known:
      with tempfile.TemporaryFile(dir=folder) as file:
        _known[number] = not _can_lock(file, folder)
  except OSError:
    return False
  return _known[number]


def _can_lock(file: IO, folder: str) -> bool:
  try:
    # The kind of lock that TensorStore takes.
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    logging.warning(
      'the file system of %s has no locks (%s): use each of its folders from '
      'one process at a time',
      folder,
      error.strerror,
    )
    return False
  return True


def without(spec: dict[str, Any]) -> dict[str, Any]:
  """TensorStore's spec of storage, to be written without locks if it has none.

  Args:
    spec: spec of a kvstore, or of one kvstore within another.
  """
  spec = {
    name: without(value) if isinstance(value, dict) else value
    for name, value in spec.items()
  }
  # Others need no lock.
  os_locks = spec.get('file_io_locking', {'mode': 'os'}) == {'mode': 'os'}
  if spec.get('driver') == 'file' and os_locks and are_missing(spec['path']):
    # Not 'lockfile': those of a process that was killed stay, and the next
    # process waits for them in vain.
    spec['file_io_locking'] = {'mode': 'none'}
  return spec
