"""Saves a run's checkpoints in the background."""

from collections.abc import Callable
import contextlib

from absl import logging
import jax

from sae_jax import checkpoint, errors
from sae_jax.storage import url as url_lib

# Number of retries of a save to a bucket. Clients of buckets give up only after
# a minute or more, so there is no wait between retries.
_TRIES = 4


class Saver:
  """Saves a run's checkpoints in the background; a context manager.

  A failed save is retried, four times in a bucket and once on disk. Runs of
  many processes never retry: their processes would wait in different
  collectives.

  The first checkpoint is looked at once it is there: what cannot be read again
  must not be believed until the end of the run.

  Attributes:
    checkpointer: Orbax's checkpointer, for reading.
  """

  def __init__(self, workdir: str, keep: int = 2):
    """Opens a run's checkpoints, see `open_checkpointer`."""
    self._workdir, self._keep = workdir, keep
    self._saving = None
    self._new = self._looked = False
    self.checkpointer = checkpoint.open_checkpointer(workdir, keep)

  def save(self, step: int, begin: Callable) -> None:
    """Waits for the save before, then begins to save a step.

    If the save before failed, this one takes its place and is waited for.

    Args:
      step: the step.
      begin: function of a checkpointer that begins to save to it and returns a
        future.

    Raises:
      UserError: if a checkpoint cannot be written, or the first one not be read
        again.
    """
    error = self.wait()
    if error is None:
      self._look()
      error = self._begin(begin)
    if error is not None:
      self._again(step, begin, error)

  def finish(self, step: int, begin: Callable) -> None:
    """Waits for the last save, that of this step; retries it if it failed.

    Raises:
      UserError: see `save`.
    """
    error = self.wait()
    if error is not None:
      self._again(step, begin, error)
    self._look()

  def _look(self) -> None:
    """Looks once whether what was saved can be read again."""
    if not self._new or self._looked:
      return
    self._looked = True
    if jax.process_index() == 0:
      latest = self.checkpointer.latest
      checkpoint.look(self.checkpointer.directory, latest.step)

  def wait(self) -> Exception | None:
    """Waits for the save that was begun; returns its error, if any."""
    saving, self._saving = self._saving, None
    try:
      if saving is not None:
        saving.result()
    except Exception as error:
      return error
    return None

  def latest(self) -> int | None:
    """The last step that is saved, after waiting for the save in progress."""
    error = self.wait()
    if error is not None:
      self._warn(error, '')
      self._look_again()
    latest = self.checkpointer.latest
    return latest.step if latest else None

  def _look_again(self) -> None:
    """Lists checkpoints anew: Orbax forgets an older one as a save begins."""
    # Several processes must open them together, so none does here.
    if jax.process_count() == 1:
      self._reopen()

  def _begin(self, begin) -> Exception | None:
    try:
      self._saving = begin(self.checkpointer)
      self._new = True
    except Exception as error:
      return error
    return None

  def _again(self, step, begin, error) -> None:
    tries = _TRIES if url_lib.is_remote(self._workdir) else 1
    for _ in range(tries if jax.process_count() == 1 else 0):
      self._warn(error, f': saving that of step {step} now')
      error = self._reopen()
      # The step may be saved, if only the deletion of an older one failed.
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
    """Opens the checkpoints anew: those that are whole; returns an error."""
    self._close()
    try:
      self.checkpointer = checkpoint.open_checkpointer(
        self._workdir, self._keep
      )
    except Exception as error:
      return error
    return None

  def _close(self) -> None:
    # All saves have been waited for; closing raises their errors once more.
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
    # A run that ended well has waited already; any other ends with an error
    # that must not be replaced by this one.
    error = self.wait()
    if error is not None:
      self._warn(error, '')
    self._close()
