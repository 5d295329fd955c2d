"""Writes a run's metrics as JSON lines and for TensorBoard."""

import io
import json
import math
import os
from typing import Any

from absl import logging
from etils import epath
import tensorboardX
from tensorboardX import record_writer

from sae_jax import config
from sae_jax.storage import files, records
from sae_jax.storage import url as url_lib


def _lines_until(path: epath.Path, step: int) -> list[str]:
  """The lines of a log up to a step; warns of damaged ones, left out."""
  if not path.exists():
    return []
  rows, damaged = records.parse_lines(path.read_bytes())
  whole = [row for row in rows if _is_written(row)]
  damaged += len(rows) - len(whole)
  if damaged:
    logging.warning('%d lines of %s are damaged: left out', damaged, path)
  return [
    json.dumps(config.through_json(row), allow_nan=False)
    for row in whole
    if row['step'] <= step
  ]


def _is_written(row: dict[str, Any]) -> bool:
  """Whether a row holds a step and numbers, as `Writer.write` gives them."""
  step = row.get('step')
  if type(step) is not int or step < 0:
    return False
  return all(
    {type(number) for number in value} <= {int}
    if isinstance(value, list)
    # By its type, for True is an int.
    else type(value) in (int, float, type(None))
    for value in row.values()
  )


class _BucketEvents:
  """TensorBoard's file in a bucket, uploaded whole at every flush.

  tensorboardX's own writer makes uploads conditional on the object's
  generation. If an answer is lost it repeats the upload, which is refused; that
  ends its thread, and the run would wait for it forever.
  """

  def __init__(self, path: str):
    self._path = path
    self._buffer = io.BytesIO()

  def write(self, data: bytes) -> None:
    self._buffer.write(data)

  def flush(self) -> None:
    try:
      files.write_bytes(self._path, self._buffer.getvalue())
    except Exception as error:
      # Retries are used up. metrics.jsonl has the same values, and the next
      # flush writes all of them again.
      logging.warning('cannot write %s: %s', self._path, error)

  def close(self) -> None:
    self.flush()


class _BucketEventsFactory:
  open = staticmethod(_BucketEvents)

  def directory_check(self, path: str) -> None:
    """Objects need no folder."""


class _LocalEvents:
  """TensorBoard's file on a disk.

  An error, such as a full disk, would end tensorboardX's thread, and the run
  would wait for it forever.
  """

  def __init__(self, path: str):
    self._path = path.removeprefix(_LOCAL)
    self._file = epath.Path(self._path).open('wb')
    self._failed = False

  def write(self, data: bytes) -> None:
    self._guarded(self._file.write, data)

  def flush(self) -> None:
    self._guarded(self._file.flush)

  def close(self) -> None:
    self._guarded(self._file.close)

  def _guarded(self, act, *args):
    # A record behind a torn one could not be read.
    if self._failed:
      return
    try:
      act(*args)
    except OSError as error:
      self._failed = True
      logging.warning(
        'cannot write %s: %s: TensorBoard sees no more of this part of the '
        'run, metrics.jsonl has it',
        self._path,
        error,
      )


class _LocalEventsFactory:
  open = staticmethod(_LocalEvents)

  def directory_check(self, path: str) -> None:
    os.makedirs(path.removeprefix(_LOCAL), exist_ok=True)


# tensorboardX chooses a factory by the prefix of the path.
_LOCAL = 'local:'
for _scheme in url_lib.remote_schemes():
  record_writer.register_writer_factory(_scheme, _BucketEventsFactory())
record_writer.register_writer_factory('local', _LocalEventsFactory())


class Writer:
  """Writes a run's metrics as JSON lines and for TensorBoard.

  The lines depend on the run alone, not on the clock, so that a run that was
  killed and resumed writes the same file as one that was not.
  """

  def __init__(self, workdir: str, step: int, active: bool = True):
    """Opens the writer.

    Args:
      workdir: folder or URL; metrics.jsonl and tensorboard/ lie in it.
      step: step after which the run goes on; lines of later steps are dropped,
        and damaged ones.
      active: whether this process writes; only one of a run does.
    """
    self._active = active
    if not active:
      return
    self._path = epath.Path(workdir) / 'metrics.jsonl'
    self._lines = _lines_until(self._path, step)
    folder = str(epath.Path(workdir) / 'tensorboard')
    self._board = tensorboardX.SummaryWriter(
      folder if url_lib.is_remote(folder) else _LOCAL + folder,
      purge_step=step + 1,
    )

  def write(
    self,
    step: int,
    values: dict[str, float],
    board_only: dict[str, float] | None = None,
    lists: dict[str, list[int]] | None = None,
  ) -> None:
    """Adds the values of a step.

    Args:
      step: the step.
      values: numbers by name. Those that are not finite are null in the lines,
        since JSON has no NaN.
      board_only: numbers for TensorBoard only, which may depend on the clock.
      lists: lists for the lines only, such as histograms.
    """
    if not self._active:
      return
    row = {name: float(value) for name, value in values.items()}
    plain = {n: v if math.isfinite(v) else None for n, v in row.items()}
    line = {'step': step, **plain, **(lists or {})}
    self._lines.append(json.dumps(line, allow_nan=False))
    for name, value in (row | (board_only or {})).items():
      self._board.add_scalar(name, value, step)

  def flush(self) -> None:
    """Writes the whole file of lines anew, and TensorBoard's."""
    if not self._active:
      return
    text = ''.join(line + '\n' for line in self._lines)
    files.write_text(self._path, text)
    self._board.flush()

  def close(self) -> None:
    """Flushes and closes."""
    self.flush()
    if self._active:
      self._board.close()
