"""Notices SIGTERM, so that a run can save before it stops."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Notice:
  """Listens for SIGTERM while it is open; a context manager.

  In a run of many processes JAX listens, and all of them learn of it at the
  same step. A single process listens itself, but only from the main thread; in
  other threads `asked` is always False.
  """

  def __init__(self):
    self._asked = False
    self._before = None
    self._many = jax.process_count() > 1
    if not self._many and threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self._note)

  def _note(self, *_) -> None:
    self._asked = True

  def asked(self, step: int) -> bool:
    """Whether to save and stop after this step; every process calls it."""
    if self._many:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)
