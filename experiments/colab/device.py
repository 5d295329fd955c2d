"""The device that a notebook runs on: what it is, and what fits it."""

from collections.abc import Iterator, Sequence
import dataclasses
from importlib import metadata
import os

import jax

import sae_jax
from sae_jax import mesh as mesh_lib
from sae_jax.ops import chip as chip_lib
from sae_jax.plan import footprint, meshes
from sae_jax.tpu.chips import CHIPS
from sae_jax.tpu.slices import Slices
from sae_jax.training import memory

# Those that Colab gives, as jax names them; see `jax.Device.device_kind`.
_KINDS = {'TPU v5 lite': 'v5e', 'TPU v6 lite': 'v6e'}
# Share of the memory that a plan may take by arithmetic: the compiler adds to
# it, and the language model has to go in as well.
_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Device:
  """Devices of one kind.

  Attributes:
    kind: as jax names it.
    count: how many there are.
    chip: 'v5e' or 'v6e', the versions of TPU that Colab gives; else ''.
    memory: bytes that a program can use of one; None if it does not say.
    devices: themselves.
  """

  kind: str
  count: int
  chip: str
  memory: int | None
  devices: tuple[jax.Device, ...]


@dataclasses.dataclass(frozen=True)
class Budget:
  """How much is harvested and trained.

  Attributes:
    n_tokens: activations to harvest.
    n_latents: latents.
    k: active latents of a token.
    batch_size: tokens of a step.
    steps: steps of training.
  """

  n_tokens: int
  n_latents: int
  k: int
  batch_size: int
  steps: int


# On a TPU 4 million tokens of training: to there and for 2,048 to 8,192 latents
# the rule of the learning rate was measured.
BUDGETS = {
  'v6e': Budget(2_000_000, 8192, 32, 4096, 1000),
  'v5e': Budget(1_000_000, 8192, 32, 2048, 2000),
  '': Budget(20_000, 1024, 16, 512, 200),
}


def find(devices: Sequence[jax.Device] | None = None) -> Device:
  """The devices that jax has, or those that are given."""
  devices = tuple(jax.devices() if devices is None else devices)
  first = devices[0]
  chip = _KINDS.get(first.device_kind, '')
  limit = (first.memory_stats() or {}).get('bytes_limit')
  if limit is None and chip:
    limit = int(Slices(chip, (1, 1), len(devices), devices).hbm_limit)
  if limit is None and first.platform == 'cpu':
    limit = memory.host_bytes() // len(devices)
  return Device(first.device_kind, len(devices), chip, limit, devices)


def lines(device: Device) -> Iterator[str]:
  """What was found, in words."""
  versions = [f'jax {jax.__version__}']
  try:
    versions.append(f'libtpu {metadata.version("libtpu")}')
  except metadata.PackageNotFoundError:
    versions.append('no libtpu')
  room = 'unknown memory'
  if device.memory:
    room = f'{device.memory / 2**30:.2f} GiB of memory each'
  yield f'{device.count} x {device.kind}, {room}; {", ".join(versions)}'
  if device.chip:
    chip = CHIPS[device.chip]
    yield (
      f'a TPU {device.chip}: {chip.flops / 1e12:,.0f} TFLOP/s and '
      f'{chip.hbm_bandwidth / 1e9:,.0f} GB/s of HBM by its data sheet'
    )
    kernels = 'are used' if chip_lib.takes_kernels() else 'need a newer jax'
    yield f'kernels {kernels}: without them a step is made by XLA alone'
  elif device.devices[0].platform == 'tpu':
    yield 'a TPU other than v5e and v6e: a small budget is taken'
  else:
    yield f'no TPU: {os.cpu_count()} cores, and a small budget is taken'


def config(device: Device, budget: Budget) -> sae_jax.TrainConfig:
  """A run of the budget on all devices, whole latents on each.

  Latents of one size per device need no exchange of candidates, and a device of
  Colab has room for them.
  """
  return sae_jax.TrainConfig(
    sae=sae_jax.SaeConfig(n_latents=budget.n_latents, k=budget.k),
    batch_size=budget.batch_size,
    steps=budget.steps,
    checkpoint_every=max(1, budget.steps // 4),
    mesh_data=device.count,
  )


def plan_lines(
  device: Device, training: sae_jax.TrainConfig, d_model: int
) -> Iterator[str]:
  """The memory of a run by arithmetic; nothing is compiled or measured.

  Args:
    device: see `find`.
    training: the run.
    d_model: width of the activations.

  Raises:
    UserError: if it is more than half of a device's memory.
  """
  sae = dataclasses.replace(training.sae, d_model=d_model)
  training = dataclasses.replace(training, sae=sae)
  mesh = mesh_lib.make_mesh(
    training.mesh_data, training.mesh_latent, device.devices
  )
  held = footprint.arguments(training, mesh)
  for name, size in held.arguments.items():
    yield f'{name:12} {size / 2**20:10,.1f} MiB'
  needed = held.total
  if device.chip:
    shape = (device.count, 1)
    guess = meshes.guess(
      training, Slices(device.chip, shape, 1, device.devices), mesh
    )
    needed = guess.hbm_bytes
    yield f'{"temporaries":12} {(needed - held.total) / 2**20:10,.1f} MiB'
    yield (
      f'a step takes {1e3 * guess.step_s:.2f} ms at the least: a bound from '
      'the data sheet, which nothing reaches'
    )
  if device.memory and needed > _SHARE * device.memory:
    raise sae_jax.UserError(
      f'the run takes {needed / 2**30:.2f} GiB of the '
      f'{device.memory / 2**30:.2f} of a device: use fewer latents or a '
      'smaller batch'
    )
  if device.memory:
    yield f'{needed / device.memory:.1%} of the memory of a device'
