"""An autoencoder read from a run's checkpoint."""

import dataclasses

import jax
import jax.numpy as jnp

from sae_jax import autoencoder, errors
from sae_jax.checkpoint import format


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
    metadata: the checkpoint's; None of one that was not read from any.
  """

  config: autoencoder.SaeConfig
  sae: autoencoder.Sae
  mse_of_mean: float
  step: int
  metadata: format.Metadata | None = None

  # `autoencoder.raw` is imported when it is used: loading needs no kernels.

  def encode(self, raw: 'autoencoder.raw.Array') -> 'autoencoder.raw.Codes':
    """The active latents of raw activations, see `raw.encode`."""
    return autoencoder.raw.encode(self.config, self.sae, raw)

  def decode(self, codes: 'autoencoder.raw.Codes') -> 'autoencoder.raw.Array':
    """The raw activations that codes stand for, see `raw.decode`."""
    return autoencoder.raw.decode(self.config, self.sae, codes)

  def reconstruct(
    self, raw: 'autoencoder.raw.Array'
  ) -> 'autoencoder.raw.Array':
    """Raw activations as the autoencoder gives them back."""
    return autoencoder.raw.reconstruct(self.config, self.sae, raw)


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
  folder = format.folder(url)
  if not folder.exists():
    raise errors.UserError(
      f'no checkpoints under {url}: give the workdir of sae-train'
    )
  with format.open_checkpointer(url, keep=None) as checkpointer:
    steps = [saved.step for saved in checkpointer.checkpoints]
    if not steps or step not in (None, *steps):
      raise errors.UserError(
        f'{url} has no checkpoint of step {"any" if step is None else step}: '
        f'it has {", ".join(map(str, steps)) or "none"}'
      )
    step = steps[-1] if step is None else step
    metadata = format.read_metadata(checkpointer, step)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sae, ema = format.read_parameters(checkpointer, step, device)
  if average:
    sae = autoencoder.averaged(
      sae, ema['ema'], ema['count'], metadata.ema_decay
    )
  return Trained(
    config=metadata.sae_config,
    sae=jax.tree.map(jnp.asarray, sae),
    mse_of_mean=metadata.mse_of_mean,
    step=step,
    metadata=metadata,
  )
