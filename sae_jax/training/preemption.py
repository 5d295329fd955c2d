"""Notices SIGTERM, so that a run can save before it stops.

Without JAX until a run trains: a process listens before it imports anything.
"""

import contextlib
import os
import signal
import sys
import threading

_NOTHING = b'SIGTERM: nothing to save yet; the same command starts or goes on\n'
# This process has others to join, which it must not leave alone.
_joining = threading.Event()
# SIGTERM came meanwhile.
_asked_early = threading.Event()


def listen() -> None:
  """From now on SIGTERM ends this process with 0, as nothing is to be saved.

  While a run trains, its `Notice` listens instead. A process of several goes on
  until they are `joined`.
  """
  # There are no flags yet.
  words = (word.lstrip('-') for word in sys.argv[1:])
  if any(word.startswith('coordinator=') for word in words):
    _joining.set()
  signal.signal(signal.SIGTERM, _end)


def _end(*_) -> None:
  if _joining.is_set():
    _asked_early.set()
  else:
    # Not by an exception, which imports and callbacks may lose.
    with contextlib.suppress(OSError):
      os.write(2, _NOTHING)
    os._exit(0)


def joined() -> None:
  """Listens on, once JAX knows its devices and has joined other processes.

  A SIGTERM that came before is passed on to all of them.
  """
  import jax

  if signal.getsignal(signal.SIGTERM) is not _end:
    return
  _joining.clear()
  if jax.process_count() == 1:
    # What JAX has loaded for its devices, libtpu for one, listens too by now.
    signal.signal(signal.SIGTERM, _end)
  if _asked_early.is_set():
    signal.raise_signal(signal.SIGTERM)


def trained() -> None:
  """Ignores SIGTERM from now on, if this process listens: it ends by itself.

  All is saved. A handler of Python's would not do: it is gone before the
  interpreter is.
  """
  if signal.getsignal(signal.SIGTERM) is _end:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Notice:
  """Listens for SIGTERM while it is open; a context manager.

  In a run of many processes JAX listens, and all of them learn of it at the
  same step. A single process listens itself, but only from the main thread; in
  other threads `asked` is always False.
  """

  def __init__(self):
    import jax

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
      from jax.experimental import multihost_utils

      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked

  def __enter__(self):
    return self

  def __exit__(self, *_):
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)
    trained()
