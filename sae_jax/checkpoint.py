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

from sae_jax import autoencoder, optimizer
from sae_jax import config as config_lib

METRIC_DEFINITIONS = {
  'space': 'activations after the preprocessing named in the sae config',
  'nmse': 'mean squared error per token / mse_of_mean, a constant: that of '
  'predicting the mean of a sample taken before training',
  'fvu': 'squared error / squared distance from the mean of the same tokens',
  'tokens': 'masked ones (position 0, attention sinks) are in no metric',
}


def open_checkpointer(
  workdir: str, every: int = 0, keep: int = 2
) -> ocp.training.Checkpointer:
  """Opens a run's checkpoints; close it, or use it as a context manager.

  Args:
    workdir: the run's folder or gs:// URL.
    every: steps between checkpoints; 0 for those that are forced only.
    keep: how many of the latest are kept.
  """
  training = ocp.training
  saves = [training.save_decision_policies.PreemptionCheckpointingPolicy()]
  if every:
    saves.append(training.save_decision_policies.FixedIntervalPolicy(every))
  return training.Checkpointer(
    epath.Path(workdir) / 'checkpoints',
    save_decision_policy=training.save_decision_policies.AnySavePolicy(saves),
    preservation_policy=training.preservation_policies.LatestN(keep),
    cleanup_tmp_directories=True,
  )


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
  folder = epath.Path(url) / 'checkpoints'
  if not folder.exists():
    raise config_lib.UserError(
      f'no checkpoints under {url}: give the workdir of sae-train'
    )
  with ocp.training.Checkpointer(folder) as checkpointer:
    steps = [found.step for found in checkpointer.checkpoints]
    if not steps or step not in (None, *steps):
      raise config_lib.UserError(
        f'{url} has no checkpoint of step {step or "any"}: '
        f'it has {", ".join(map(str, steps)) or "none"}'
      )
    step = steps[-1] if step is None else step
    about = checkpointer.metadata(step).custom_metadata
    config = config_lib.from_dict(
      autoencoder.SaeConfig, about['train_config']['sae']
    )
    optimizer_config = config_lib.from_dict(
      optimizer.OptimizerConfig, about['train_config']['optimizer']
    )
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def shapes():
      sae = autoencoder.init_weights(config, jax.random.key(0))
      return {'sae': sae, 'ema': optimizer.init(optimizer_config, sae).ema}

    wanted = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device),
      jax.eval_shape(shapes),
    )
    parts = checkpointer.load_checkpointables(step, wanted)
  sae = parts['sae']
  if average:
    sae = optimizer.averaged(optimizer_config, sae, parts['ema'])
  return Trained(
    config=config,
    sae=jax.tree.map(jnp.asarray, sae),
    mse_of_mean=about['mse_of_mean'],
    step=step,
    about=about,
  )
