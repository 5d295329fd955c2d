"""Saves a run's checkpoints in the background."""

from collections.abc import Callable
import contextlib

from absl import logging
import jax

from sae_jax import checkpoint, errors
from sae_jax.storage import url as url_lib

# How often a save to a bucket is retried. Clients wait for a minute and more
# before they give up, so nothing waits here.
_TRIES = 4


class Saver:
  """Saves a run's checkpoints in the background; a context manager.

  A failed save is retried, four times in a bucket and once on disk. Runs of
  many processes never retry: their processes would wait in different
  collectives.

  Attributes:
    checkpointer: Orbax's, to read what is there.
  """

  def __init__(self, workdir: str, keep: int = 2):
    """Opens a run's checkpoints, see `open_checkpointer`."""
    self._workdir, self._keep = workdir, keep
    self._saving = None
    self.checkpointer = checkpoint.open_checkpointer(workdir, keep)

  def save(self, step: int, begin: Callable) -> None:
    """Begins to save a step, when the one before is saved.

    If that one failed, this one takes its place, and is waited for.

    Args:
      step: the step.
      begin: of a checkpointer; begins to save to it, and returns what has the
        `result`.

    Raises:
      UserError: if a checkpoint cannot be written.
    """
    error = self.wait() or self._begin(begin)
    if error is not None:
      self._again(step, begin, error)

  def finish(self, step: int, begin: Callable) -> None:
    """Waits for the last save, of this step; makes it again if it failed.

    Raises:
      UserError: see `save`.
    """
    error = self.wait()
    if error is not None:
      self._again(step, begin, error)

  def wait(self) -> Exception | None:
    """Waits for the save that was begun; returns why it failed."""
    saving, self._saving = self._saving, None
    try:
      if saving is not None:
        saving.result()
    except Exception as error:
      return error
    return None

  def latest(self) -> int | None:
    """The last step that is saved, when all that was begun has ended."""
    error = self.wait()
    if error is not None:
      self._warn(error, '')
      self._look_again()
    latest = self.checkpointer.latest
    return latest.step if latest else None

  def _look_again(self) -> None:
    """Orbax forgets an older step when it begins to save, though it is kept."""
    # Processes open together or not at all.
    if jax.process_count() == 1:
      self._reopen()

  def _begin(self, begin) -> Exception | None:
    try:
      self._saving = begin(self.checkpointer)
    except Exception as error:
      return error
    return None

  def _again(self, step, begin, error) -> None:
    tries = _TRIES if url_lib.is_remote(self._workdir) else 1
    for _ in range(tries if jax.process_count() == 1 else 0):
      self._warn(error, f': saving that of step {step} now')
      error = self._reopen()
      # What failed may have been no more than to delete an older one.
      saved = {entry.step for entry in self.checkpointer.checkpoints}
      if error is None and step not in saved:
        error = self._begin(begin) or self.wait()
      if error is None:
        return
    self._look_again()
    latest = self.checkpointer.latest
    good = f'that of step {latest.step} is good' if latest else 'there is none'
    raise errors.UserError(
      f'cannot save checkpoints of {self._workdir} ({good}): '
      f'{errors.reason(error)}: check the path, free space and your '
      'access; the same command goes on'
    ) from error

  def _reopen(self) -> Exception | None:
    """Finds out what is whole; Orbax removes the rest before it saves."""
    self._close()
    try:
      self.checkpointer = checkpoint.open_checkpointer(
        self._workdir, self._keep
      )
    except Exception as error:
      return error
    return None

  def _close(self) -> None:
    # All has been waited for, and its errors are known; they come again here.
    with contextlib.suppress(Exception):
      self.checkpointer.close()

  def _warn(self, error: Exception, then: str) -> None:
    logging.warning(
      'a checkpoint of %s was not saved: %s%s',
      self._workdir,
      errors.reason(error),
      then,
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    # A run that ended well has waited; another has an error of its own.
    error = self.wait()
    if error is not None:
      self._warn(error, '')
    self._close()
