"""Checkpoints: what training saves and all that probing needs.

A checkpoint is an Orbax bundle of four parts, so that a reader takes only what
it wants: `sae` (the parameters), `ema` (their moving average, undebiased),
`adam` and `progress` (step and silence counters). Its custom metadata, JSON,
holds the configs, the dataset's identity and what the metrics mean.
"""

from collections.abc import Callable
import contextlib
import dataclasses
from typing import Any

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from sae_jax import autoencoder, files, optimizer
from sae_jax import config as config_lib

METRIC_DEFINITIONS = {
  'space': 'activations after the preprocessing named in the sae config',
  'nmse': 'mean squared error per token / mse_of_mean, a constant: that of '
  'predicting the mean of a sample taken before training',
  'fvu': 'squared error / squared distance from the mean of the same tokens',
  'tokens': 'masked ones (position 0, attention sinks) are in no metric',
}


# How often a checkpoint in a bucket is begun again. Clients wait for a minute
# and more before they give up, so nothing waits here.
_TRIES = 4


def open_checkpointer(workdir: str, keep: int = 2) -> ocp.training.Checkpointer:
  """Opens a run's checkpoints; close it, or use it as a context manager.

  Args:
    workdir: the run's folder or gs:// URL.
    keep: how many of the latest are kept.
  """
  context = ocp.Context()
  # In a bucket a transaction on OCDBT takes its own write, if the answer was
  # lost, for another's, and the checkpoint fails with ALREADY_EXISTS.
  context.array.saving.use_ocdbt = '://' not in workdir
  return ocp.training.Checkpointer(
    # Orbax writes to no relative path.
    epath.Path(files.absolute(workdir)) / 'checkpoints',
    context=context,
    preservation_policy=ocp.training.preservation_policies.LatestN(keep),
    cleanup_tmp_directories=True,
  )


class Saver:
  """Saves a run's checkpoints in the background; a context manager.

  What failed is made again: in a bucket some times, on a disk once. A run of
  many processes is not: they would wait for each other at other places.

  Attributes:
    checkpointer: Orbax's, to read what is there.
  """

  def __init__(self, workdir: str, keep: int = 2):
    """Opens a run's checkpoints, see `open_checkpointer`."""
    self._workdir, self._keep = workdir, keep
    self._saving = None
    self.checkpointer = open_checkpointer(workdir, keep)

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
    tries = _TRIES if '://' in self._workdir else 1
    for _ in range(tries if jax.process_count() == 1 else 0):
      self._warn(error, f': saving that of step {step} now')
      error = self._reopen()
      # What failed may have been no more than to delete an older one.
      there = self.checkpointer.checkpoints
      if error is None and all(found.step != step for found in there):
        error = self._begin(begin) or self.wait()
      if error is None:
        return
    self._look_again()
    latest = self.checkpointer.latest
    good = f'that of step {latest.step} is good' if latest else 'there is none'
    raise config_lib.UserError(
      f'cannot save checkpoints of {self._workdir} ({good}): '
      f'{config_lib.reason(error)}: check the path, free space and your '
      'access; the same command goes on'
    ) from error

  def _reopen(self) -> Exception | None:
    """Finds out what is whole; Orbax removes the rest before it saves."""
    self._close()
    try:
      self.checkpointer = open_checkpointer(self._workdir, self._keep)
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
      config_lib.reason(error),
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


def _damaged(checkpointer, step: int, error: Exception) -> config_lib.UserError:
  folder = epath.Path(checkpointer.directory) / str(step)
  return config_lib.UserError(
    f'checkpoint {folder} cannot be read ({type(error).__name__}: '
    f'{config_lib.reason(error)}): check your access; if it is damaged, delete '
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


@dataclasses.dataclass(frozen=True)
class Trained:
  """An autoencoder read from a checkpoint.

  Attributes:
    config: its config.
    sae: its parameters.
    mse_of_mean: the constant that NMSE divides by.
    step: the step it was saved after.
    about: the checkpoint's metadata: configs, dataset identity, definitions.
  """

  config: autoencoder.SaeConfig
  sae: autoencoder.Sae
  mse_of_mean: float
  step: int
  about: dict[str, Any]


def load(url: str, *, average: bool = True, step: int | None = None) -> Trained:
  """Reads an autoencoder from a run's workdir, on one device.

  Args:
    url: the run's workdir, a local path or gs:// URL.
    average: whether to take the moving average, bias-corrected, or the last
      parameters themselves.
    step: which checkpoint; None for the latest.

  Raises:
    UserError: if there is no checkpoint, or none of that step.
  """
  folder = epath.Path(files.absolute(url)) / 'checkpoints'
  if not folder.exists():
    raise config_lib.UserError(
      f'no checkpoints under {url}: give the workdir of sae-train'
    )
  with ocp.training.Checkpointer(folder) as checkpointer:
    steps = [found.step for found in checkpointer.checkpoints]
    if not steps or step not in (None, *steps):
      raise config_lib.UserError(
        f'{url} has no checkpoint of step {"any" if step is None else step}: '
        f'it has {", ".join(map(str, steps)) or "none"}'
      )
    step = steps[-1] if step is None else step
    record = about(checkpointer, step)
    config = config_lib.from_dict(
      autoencoder.SaeConfig, record['train_config']['sae']
    )
    optimizer_config = config_lib.from_dict(
      optimizer.OptimizerConfig, record['train_config']['optimizer']
    )
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def shapes():
      sae = autoencoder.init_weights(config, jax.random.key(0))
      return {'sae': sae, 'ema': optimizer.init(optimizer_config, sae).ema}

    wanted = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device),
      jax.eval_shape(shapes),
    )
    parts = read(checkpointer, step, wanted)
  sae = parts['sae']
  if average:
    sae = optimizer.averaged(optimizer_config, sae, parts['ema'])
  return Trained(
    config=config,
    sae=jax.tree.map(jnp.asarray, sae),
    mse_of_mean=record['mse_of_mean'],
    step=step,
    about=record,
  )
