"""Claims of work that lapse when their holder is gone, in a shared folder."""

from collections.abc import Callable
import dataclasses
import json
import threading
import time

from absl import logging

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.storage import files as files_lib

# A lease is renewed so many times before it would lapse.
_RENEWALS = 4


@dataclasses.dataclass(frozen=True)
class Holder:
  """Who has a piece of work.

  Attributes:
    worker: a name of its own.
    at: seconds since 1970 when it last said so, by its own clock.
    seconds: after which it counts as gone.
  """

  worker: str
  at: float
  seconds: float

  def is_gone(self, now: float) -> bool:
    """Whether another may take the work."""
    return now > self.at + self.seconds


class Leases:
  """Pieces of work that this worker has, each an object of a folder.

  A thread renews them while the context is open; at its end they are given up.
  Clocks of workers may differ by a fraction of `seconds`. Whoever was away for
  longer may have lost its work to another: `lost` says so, and what both write
  must then be the same.
  """

  def __init__(
    self,
    url: str,
    worker: str,
    seconds: float,
    now: Callable[[], float] = time.time,
  ):
    """Opens the folder.

    Args:
      url: local path or URL of the folder, which may be absent.
      worker: a name that no other worker has.
      seconds: after which an unrenewed lease lapses.
      now: the clock.

    Raises:
      UserError: if the folder cannot be opened.
    """
    self.url, self.worker, self.seconds = url, worker, seconds
    self._now = now
    self._held: dict[str, bytes] = {}
    # Held while the folder is asked: a lease that is given up is not renewed.
    self._lock = threading.RLock()
    self._closed = threading.Event()
    self._thread = None
    self.lost = threading.Event()
    self._files = self._asked(lambda: files_lib.folder(url))

  def holder(self, name: str) -> Holder | None:
    """Who has a piece of work; None if it is free."""
    return self._read(name)[0]

  def take(self, name: str) -> bool:
    """Takes a piece of work that is free, or whose worker is gone.

    Raises:
      UserError: if the folder cannot be read or written.
    """
    with self._lock:
      holder, generation = self._read(name)
      if holder and holder.worker != self.worker:
        if not holder.is_gone(self._now()):
          return False
        logging.info('%s: worker %s is gone', name, holder.worker)
      return self._write(name, generation)

  def give_up(self, name: str) -> None:
    """Lets others take a piece of work, if it is this worker's still."""
    with self._lock:
      generation = self._held.pop(name, None)
      if generation is not None:
        # A write of nothing deletes.
        self._asked(
          lambda: self._files.write(name, None, if_equal=generation).result()
        )

  def renew(self) -> None:
    """Says that this worker is there still, for all that it has.

    Raises:
      UserError: if the folder cannot be written.
    """
    with self._lock:
      for name, generation in list(self._held.items()):
        if not self._write(name, generation):
          self._held.pop(name, None)
          logging.warning('%s was taken by another worker meanwhile', name)
          self.lost.set()

  def __enter__(self):
    self._thread = threading.Thread(
      target=self._renew_often, name='leases', daemon=True
    )
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._closed.set()
    self._thread.join()
    for name in list(self._held):
      self.give_up(name)

  def _renew_often(self) -> None:
    while not self._closed.wait(self.seconds / _RENEWALS):
      try:
        self.renew()
      except errors.UserError as error:
        # It is tried again before the leases lapse.
        logging.warning('%s', error)

  def _read(self, name: str) -> tuple[Holder | None, bytes]:
    stored = self._asked(lambda: self._files.read(name).result())
    if stored.state != 'value':
      return None, files_lib.ABSENT
    try:
      record = json.loads(stored.value)
      holder = Holder(
        str(record['worker']), float(record['at']), float(record['seconds'])
      )
    except (ValueError, KeyError, TypeError):
      # What nobody can read nobody holds.
      holder = None
    return holder, stored.stamp.generation

  def _write(self, name: str, generation: bytes) -> bool:
    holder = Holder(self.worker, self._now(), self.seconds)
    data = config_lib.to_json(holder).encode()
    stamp = self._asked(
      lambda: self._files.write(name, data, if_equal=generation).result()
    )
    generation = stamp.generation
    if not generation:
      # It may be ours, if the server's answer was lost.
      holder, generation = self._read(name)
      if holder is None or holder.worker != self.worker:
        return False
    self._held[name] = generation
    return True

  def _asked(self, act):
    try:
      return act()
    except ValueError as error:
      raise errors.UserError(
        f'cannot use the claims in {self.url}: {errors.reason(error)}: check '
        'the path and your access'
      ) from error
