"""Checkpoints: what training saves and all that probing needs.

A checkpoint is an Orbax bundle of four parts, so that a reader takes only what
it wants: `sae` (the parameters), `ema` (their moving average, undebiased),
`adam` and `progress` (step and silence counters). Its custom metadata, JSON,
holds the configs, the dataset's identity and what the metrics mean.
"""

import dataclasses
from typing import Any

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


def open_checkpointer(workdir: str, keep: int = 2) -> ocp.training.Checkpointer:
  """Opens a run's checkpoints; close it, or use it as a context manager.

  Args:
    workdir: the run's folder or gs:// URL.
    keep: how many of the latest are kept.
  """
  return ocp.training.Checkpointer(
    # Orbax writes to no relative path.
    epath.Path(files.absolute(workdir)) / 'checkpoints',
    preservation_policy=ocp.training.preservation_policies.LatestN(keep),
    cleanup_tmp_directories=True,
  )


def _damaged(checkpointer, step: int, error: Exception) -> config_lib.UserError:
  folder = epath.Path(checkpointer.directory) / str(step)
  return config_lib.UserError(
    f'checkpoint {folder} cannot be read ({type(error).__name__}), it is '
    'damaged: delete that folder to go on from the one before'
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
