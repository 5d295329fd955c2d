"""Checkpoints: what training saves and all that probing needs.

A checkpoint is an Orbax bundle of four parts, so that a reader takes only what
it wants: `sae` (the parameters), `ema` (their moving average, undebiased),
`adam` and `progress` (step and silence counters). Its custom metadata, JSON,
holds the configs, the dataset's identity and what the metrics mean.
"""

from typing import Any

from etils import epath
from orbax.checkpoint import v1 as ocp

from sae_jax import errors
from sae_jax.storage import orbax as orbax_lib
from sae_jax.storage import url as url_lib


def open_checkpointer(workdir: str, keep: int = 2) -> ocp.training.Checkpointer:
  """Opens a run's checkpoints; close it, or use it as a context manager.

  Args:
    workdir: the run's folder or URL.
    keep: how many of the latest are kept.
  """
  return ocp.training.Checkpointer(
    # Orbax writes to no relative path.
    epath.Path(url_lib.absolute(workdir)) / 'checkpoints',
    context=orbax_lib.context(workdir),
    preservation_policy=ocp.training.preservation_policies.LatestN(keep),
    cleanup_tmp_directories=True,
  )


def _damaged(checkpointer, step: int, error: Exception) -> errors.UserError:
  folder = epath.Path(checkpointer.directory) / str(step)
  return errors.UserError(
    f'checkpoint {folder} cannot be read ({type(error).__name__}: '
    f'{errors.reason(error)}): check your access; if it is damaged, delete '
    'that folder to go on from the one before'
  )


def about(checkpointer: ocp.training.Checkpointer, step: int) -> dict[str, Any]:
  """The metadata that training saved with a checkpoint.

  Raises:
    UserError: if it is damaged.
  """
  try:
    found = checkpointer.metadata(step).custom_metadata
  except (KeyError, ValueError, OSError) as error:
    raise _damaged(checkpointer, step, error) from error
  if not found or 'train_config' not in found:
    raise _damaged(checkpointer, step, KeyError('train_config'))
  return found


def read(
  checkpointer: ocp.training.Checkpointer, step: int, wanted: dict[str, Any]
) -> dict[str, Any]:
  """Some parts of a checkpoint.

  Args:
    checkpointer: from `open_checkpointer`.
    step: of the checkpoint.
    wanted: shapes, dtypes and shardings of the parts that are read.

  Raises:
    UserError: if a part is missing, damaged or of another shape.
  """
  try:
    return checkpointer.load_checkpointables(step, wanted)
  except (KeyError, ValueError, OSError) as error:
    raise _damaged(checkpointer, step, error) from error
