"""An autoencoder read from a run's checkpoint."""

import dataclasses
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from sae_jax import autoencoder, errors
from sae_jax import config as config_lib
from sae_jax.autoencoder import raw as raw_lib
from sae_jax.checkpoint import format
from sae_jax.storage import orbax as orbax_lib
from sae_jax.storage import url as url_lib
from sae_jax.training import optimizer


@dataclasses.dataclass(frozen=True)
class Trained:
  """An autoencoder read from a checkpoint.

  Its methods take and give activations as the subject model has them, arrays
  [..., D] of numpy or jax; see `autoencoder.raw`. `reconstruct` is `decode` of
  `encode`.

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

  def encode(self, raw: raw_lib.Array) -> raw_lib.Codes:
    """The active latents of raw activations, see `raw.encode`."""
    return raw_lib.encode(self.config, self.sae, raw)

  def decode(self, codes: raw_lib.Codes) -> raw_lib.Array:
    """The raw activations that codes stand for, see `raw.decode`."""
    return raw_lib.decode(self.config, self.sae, codes)

  def reconstruct(self, raw: raw_lib.Array) -> raw_lib.Array:
    """Raw activations as the autoencoder gives them back."""
    return raw_lib.reconstruct(self.config, self.sae, raw)


def load(url: str, *, average: bool = True, step: int | None = None) -> Trained:
  """Reads an autoencoder from a run's workdir, on one device.

  Args:
    url: the run's workdir, a local path or URL.
    average: whether to take the moving average, bias-corrected, or the last
      parameters themselves.
    step: which checkpoint; None for the latest.

  Raises:
    UserError: if there is no checkpoint, or none of that step.
  """
  folder = epath.Path(url_lib.absolute(url)) / 'checkpoints'
  if not folder.exists():
    raise errors.UserError(
      f'no checkpoints under {url}: give the workdir of sae-train'
    )
  with ocp.training.Checkpointer(
    folder, context=orbax_lib.context(url)
  ) as checkpointer:
    steps = [found.step for found in checkpointer.checkpoints]
    if not steps or step not in (None, *steps):
      raise errors.UserError(
        f'{url} has no checkpoint of step {"any" if step is None else step}: '
        f'it has {", ".join(map(str, steps)) or "none"}'
      )
    step = steps[-1] if step is None else step
    record = format.about(checkpointer, step)
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
    parts = format.read(checkpointer, step, wanted)
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
