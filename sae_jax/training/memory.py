"""Whether runs can be in memory at all, before minutes are spent on them."""

from collections.abc import Sequence
import os
import pathlib

from jax.sharding import Mesh

from sae_jax import errors
from sae_jax.training.config import TrainConfig

# Bytes of a parameter; both moments of Adam and the moving average are three
# more of its size, but for a frozen part.
_BYTES = 4
_BATCH_BYTES = 2
_CGROUP = '/sys/fs/cgroup/memory.max'


def state_bytes(config: TrainConfig) -> int:
  """Bytes of the state of a run, in all shards; its counters left out."""
  n_latents, d_model = config.sae.n_latents, config.sae.d_model
  matrix = n_latents * d_model
  size = 2 * matrix + n_latents + d_model
  size += d_model**2 * config.sae.skip
  frozen = 0 if config.optimizer.freeze == 'none' else matrix
  return _BYTES * (size + 3 * (size - frozen))


def check(configs: Sequence[TrainConfig], mesh: Mesh) -> None:
  """Refuses what is sure not to fit: states and batch are less than is needed.

  Args:
    configs: runs whose states are in memory at once, with their d_model.
    mesh: its devices.

  Raises:
    UserError: if they are larger than the memory of a device.
  """
  there = device_bytes(mesh)
  if there is None:
    return
  first = configs[0]
  latent, data = mesh.shape['latent'], mesh.shape['data']
  states = sum(map(state_bytes, configs)) // latent
  batch = first.batch_size // data * first.sae.row_width * _BATCH_BYTES
  if states + batch <= there:
    return
  runs = f'{len(configs)} runs' if len(configs) > 1 else 'the run'
  raise errors.UserError(
    f'the state of {runs} takes {_gib(states)} and a batch {_gib(batch)} on '
    f'each device, which has {_gib(there)}: use fewer n_latents, a smaller '
    'batch_size or more devices'
  )


def device_bytes(mesh: Mesh) -> int | None:
  """Bytes of memory of a device; None if it does not say."""
  device = mesh.local_devices[0]
  stats = device.memory_stats() or {}
  if device.platform == 'cpu':
    # They share the host's.
    return host_bytes() // len(mesh.local_devices)
  return stats.get('bytes_limit')


def host_bytes(cgroup: str = _CGROUP) -> int:
  """Bytes of this host's memory, or of the part that a container may use."""
  physical = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  try:
    return min(physical, int(pathlib.Path(cgroup).read_text()))
  except (OSError, ValueError):
    # There is no such limit, or it says 'max'.
    return physical


def _gib(size: int) -> str:
  return f'{size / 2**30:,.2f} GiB'
