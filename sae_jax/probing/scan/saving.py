"""Saves the scan's state as it goes, and finds it again."""

import contextlib
import io
from typing import Any

from absl import logging
from etils import epath
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from sae_jax import errors
from sae_jax.probing.scan.codes import Writer
from sae_jax.storage import files, records, saved_arrays
from sae_jax.storage import orbax as orbax_lib
from sae_jax.storage import url as url_lib

# In a workdir.
FOLDER = 'scan'
_PART = 'state'
# Where Orbax keeps what it is told of a checkpoint.
_RECORD = '_CHECKPOINT_METADATA'


class Saver:
  """Saves states under a workdir; a context manager.

  The step of a checkpoint is the row that comes next. The codes that wait for
  their shard to be full lie beside it, from the process that owns them.

  Attributes:
    folder: where they lie.
  """

  def __init__(self, workdir: str, made_from: dict[str, Any]):
    """Opens the folder.

    Args:
      workdir: of the results.
      made_from: what a state must have been made from to be gone on with, as it
        reads back from JSON.
    """
    self.folder = epath.Path(url_lib.absolute(workdir)) / FOLDER
    self._made_from = made_from
    self._checkpointer = ocp.training.Checkpointer(
      self.folder,
      context=orbax_lib.context(workdir),
      preservation_policy=ocp.training.preservation_policies.LatestN(1),
      cleanup_tmp_directories=True,
    )

  def save(self, row: int, width: int, state: Any, codes: Writer) -> None:
    """Saves a state, and waits until it is there.

    Args:
      row: the row that comes next.
      width: columns of the codes.
      state: the state.
      codes: those that have been written so far.

    Raises:
      UserError: if it cannot be saved.
    """
    try:
      if codes.owns(codes.row):
        with io.BytesIO() as file:
          np.savez(file, *codes.unwritten())
          files.write_bytes(self._waiting(row), file.getvalue())
      self._checkpointer.save_checkpointables(
        row,
        {_PART: state},
        force=True,
        custom_metadata={
          'made_from': self._made_from,
          'width': width,
          'codes_row': codes.row,
        },
      )
      if jax.process_index() == 0:
        for path in self.folder.glob('codes-*.npz'):
          if path != self._waiting(row):
            path.unlink()
    except Exception as error:
      raise errors.UserError(
        f'cannot save the scan in {self.folder}: {errors.reason(error)}: '
        'check the path, free space and your access; the same command goes on'
      ) from error

  def load(self, wanted: Any, codes: Writer) -> tuple[int, int, Any] | None:
    """The state that was saved last, if it is of the same inputs and mesh.

    Args:
      wanted: shapes, dtypes and shardings of a state.
      codes: goes on where they were.

    Returns:
      The row that comes next, the width of the codes and the state; None if
      there is none.

    Raises:
      UserError: if it is damaged.
    """
    latest = self._checkpointer.latest
    if latest is None:
      return None
    path = self.folder / str(latest.step)
    remedy = f'delete {self.folder}, and the scan begins again'
    record = records.read(path / _RECORD, remedy).get('custom_metadata') or {}
    if record.get('made_from') != self._made_from:
      logging.warning(
        '%s is of other inputs or of another mesh: the scan begins again', path
      )
      self._checkpointer.delete(latest.step)
      return None

    def read():
      saved_arrays.check_json(str(path / _PART), remedy)
      return self._checkpointer.load_checkpointables(
        latest.step, {_PART: wanted}
      )[_PART]

    state = orbax_lib.explained(read, path, [path / _PART], remedy)
    row, waiting = record['codes_row'], (None, None)
    try:
      if codes.owns(row):
        with np.load(io.BytesIO(self._waiting(latest.step).read_bytes())) as of:
          waiting = of['arr_0'], of['arr_1']
    except (OSError, ValueError, KeyError) as error:
      raise errors.UserError(
        f'{self._waiting(latest.step)} cannot be read '
        f'({errors.reason(error)}): {remedy}'
      ) from error
    codes.resume(row, *waiting)
    return latest.step, record['width'], state

  def _waiting(self, row: int) -> epath.Path:
    return self.folder / f'codes-{row}.npz'

  def __enter__(self):
    return self

  def __exit__(self, *_):
    with contextlib.suppress(Exception):
      self._checkpointer.close()
