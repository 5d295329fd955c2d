"""Progress of long stages: a bar on a terminal, plain lines elsewhere."""

import io
import sys
import time

from absl import logging
import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class _Lines(tqdm.tqdm):
  """A tqdm that logs a line every few seconds and at the end."""

  def __init__(self, *args, **kwargs):
    self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
    self._last_shown = None
    # tqdm itself writes line ends, which are dropped.
    super().__init__(
      *args,
      file=io.StringIO(),
      mininterval=_SECONDS_BETWEEN_LINES,
      maxinterval=1e9,
      **kwargs,
    )

  def display(self, msg=None, pos=None):
    done = self.total is not None and self.n >= self.total
    if self.n == self._last_shown or (
      not done and time.monotonic() < self._next_line
    ):
      return
    self._last_shown = self.n
    self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
    logging.info('%s', msg or str(self))

  def close(self):
    if not self.disable:
      self.display()
    super().close()


def bar(iterable=None, *, total=None, unit='it', desc=None, initial=0):
  """A progress bar with rate and ETA.

  Args:
    iterable: the things to iterate over, or None to call `update(n)` by hand.
    total: number of units; the length of the iterable if it has one.
    unit: the unit's name, shown in the rate.
    desc: label of the bar.
    initial: units done before this stage started; the rate leaves them out.

  Returns:
    A tqdm object: iterate it, or use it as a context manager.
  """
  kind = tqdm.tqdm if sys.stderr.isatty() else _Lines
  return kind(
    iterable,
    total=total,
    unit=unit,
    desc=desc,
    initial=initial,
    unit_scale=True,
    dynamic_ncols=True,
  )
