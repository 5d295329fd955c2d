"""An autoencoder read from a run's checkpoint."""

import dataclasses
import gc
import math
import os

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import autoencoder, errors
from sae_jax import mesh as mesh_lib
from sae_jax.checkpoint import format
from sae_jax.storage import orbax, saved_arrays, tensors

_LARGE = 2**26


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


@dataclasses.dataclass(frozen=True)
class Saved:
  """An autoencoder as `Trained` has it, whose values are not read yet.

  Attributes:
    config: its config.
    sae: its parameters, of which each is a `tensors.Tensor`.
    metadata: the checkpoint's; None of one that is in no checkpoint.
  """

  config: autoencoder.SaeConfig
  sae: autoencoder.Sae
  metadata: format.Metadata | None = None


def exists(url: str) -> bool:
  """Whether a workdir has checkpoints, whole or not."""
  return bool(format.steps(format.folder(url)))


def load(
  url: str,
  *,
  mesh: jax.sharding.Mesh | None = None,
  average: bool = True,
  step: int | None = None,
) -> Trained:
  """Reads an autoencoder from a run's workdir.

  No more is read than it is made of, an array at a time: beside the
  autoencoder there is memory for one array.

  Args:
    url: the run's workdir, a local path or URL.
    mesh: a mesh with the axes of `mesh.AXES` on which the arrays are split by
      the letters of their names; each process reads what its devices hold.
      None for one device of this process.
    average: whether to take the moving average, bias-corrected, or the last
      parameters themselves.
    step: which checkpoint; None for the latest.

  Raises:
    UserError: if there is no checkpoint, or none of that step; if it is
      damaged; if the mesh does not divide its latents.
  """
  with _open(url) as checkpointer:
    step = _chosen(checkpointer, url, step)
    metadata = format.read_metadata(checkpointer, step)
    config = metadata.sae_config
    if mesh is not None:
      _check_divides(url, config.n_latents, mesh)
    decay = metadata.ema_decay if average else 0
    arrays = _read(checkpointer, step, mesh, decay)
  return Trained(
    config=config,
    sae=autoencoder.from_dict(arrays),
    mse_of_mean=metadata.mse_of_mean,
    step=step,
    metadata=metadata,
  )


def opened(url: str) -> Saved:
  """The latest of a run's checkpoints, averaged as `load` does by default.

  Values are read, and compared to their checksums, part by part as they are
  asked for; UserError then if they are damaged.

  Args:
    url: the run's workdir, a local path or URL.

  Raises:
    UserError: see `load`.
  """
  with _open(url) as checkpointer:
    step = _chosen(checkpointer, url, None)
    metadata = format.read_metadata(checkpointer, step)
    saved = format.saved_parts(checkpointer, step, ('sae', 'ema'))

    def tensor(*path: str) -> tensors.Tensor:
      return _tensor(checkpointer.directory, step, path)

    decay, in_average = metadata.ema_decay, ()
    if decay and (count := tensor('ema', 'count').read()):
      in_average = saved['ema']['ema']
    arrays = {}
    for name in [name for name, a in saved['sae'].items() if a is not None]:
      if name not in in_average:
        arrays[name] = tensor('sae', name)
        continue
      sums = tensor('ema', 'ema', name)
      weight = autoencoder.sum_of_weights(jnp.asarray(count), decay, sums.dtype)
      arrays[name] = _corrected_parts(sums, np.asarray(weight))
  return Saved(metadata.sae_config, autoencoder.from_dict(arrays), metadata)


def _tensor(folder, step, path) -> tensors.Tensor:
  """An array by its part's name and its keys; UserError if it is damaged."""
  part, *keys = path

  def explained(load):
    place, remedy = folder / str(step), format.remedy_of(folder, step)
    return orbax.explained(load, place, [place / part], remedy)

  stored = explained(
    lambda: saved_arrays.tensor(os.fspath(folder / str(step) / part), keys)
  )
  return dataclasses.replace(
    stored, part=lambda ranges: explained(lambda: stored.part(ranges))
  )


def _corrected_parts(sums, weight) -> tensors.Tensor:
  def part(ranges):
    return np.asarray(_corrected(jnp.asarray(sums.part(ranges)), weight))

  return dataclasses.replace(sums, part=part)


def _open(url: str):
  """The checkpoints of a workdir; UserError if it has none."""
  if not format.folder(url).exists():
    raise errors.UserError(
      f'no checkpoints under {url}: give the workdir of sae-train'
    )
  return format.open_checkpointer(url, keep=None)


def _chosen(checkpointer, url: str, step: int | None) -> int:
  """A step, or the latest; UserError if there is no checkpoint of it."""
  steps = [saved.step for saved in checkpointer.checkpoints]
  if not steps:
    raise errors.UserError(
      f'{url} has no finished checkpoint: what wrote it was stopped, run it '
      'again'
    )
  if step not in (None, *steps):
    raise errors.UserError(
      f'{url} has no checkpoint of step {step}: it has '
      f'{", ".join(map(str, steps))}'
    )
  return steps[-1] if step is None else step


def _read(checkpointer, step, mesh, decay) -> dict[str, jax.Array]:
  """The arrays by name: `autoencoder.averaged`, or with no decay the last."""

  def array(*path: str) -> jax.Array:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharding = device
    if mesh is not None:
      sharding = mesh_lib.sharding(mesh, mesh_lib.letters(path[-1]))
    read = format.read_array(checkpointer, step, saved, path, sharding)
    if read.nbytes >= _LARGE:
      # Orbax leaves what it has read on the host in a cycle of references, and
      # the copy to the device needs it until it is done.
      read.block_until_ready()
      gc.collect()
    return read

  saved = format.saved_parts(checkpointer, step, ('sae', 'ema'))
  names = [name for name, a in saved['sae'].items() if a is not None]
  in_average, count = (), 0
  if decay:
    # Every process has it whole.
    count = np.asarray(array('ema', 'count'))
    in_average = saved['ema']['ema'] if count else ()
  arrays = {}
  for name in names:
    if name not in in_average:
      arrays[name] = array('sae', name)
      continue
    sums = array('ema', 'ema', name)
    weight = autoencoder.sum_of_weights(jnp.asarray(count), decay, sums.dtype)
    # In place. Not in the program, where it might be rounded otherwise.
    arrays[name] = _corrected(sums, np.asarray(weight))
  return arrays


_corrected = jax.jit(autoencoder.corrected, donate_argnums=0)


def _check_divides(url: str, n_latents: int, mesh: jax.sharding.Mesh) -> None:
  parts = mesh.shape['latent']
  if n_latents % parts:
    raise errors.UserError(
      f'the {n_latents} latents of {url} are no multiple of the latent axis '
      f'({parts}) of the mesh: use --mesh_latent='
      f'{math.gcd(n_latents, mesh.size)}'
    )
