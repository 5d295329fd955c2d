"""Which runs are trained on one reading of a store."""

from collections.abc import Sequence

from sae_jax import config as config_lib
from sae_jax.sweeps.grid import Cell
from sae_jax.training import memory
from sae_jax.training.config import TrainConfig

# Of a device's memory; the rest is for what a step needs between.
_SHARE = 0.75
# Gradients of both matrices, of one run at a time, over its state.
_GRADIENTS = 1 / 4


def packs(
  cells: Sequence[Cell], device_bytes: int | None, latent: int, most: int = 0
) -> list[list[Cell]]:
  """Cells that share a store and its order, as many as fit the memory.

  Those of a pack have about the same number of steps, as a reading lasts until
  the last of its runs has ended. The packs that take most come first.

  Args:
    cells: runs that are left to do.
    device_bytes: memory of a device; None if it is not known.
    latent: shards of the latents.
    most: runs of a pack; 0 for any number.
  """
  readings = {}
  for cell in cells:
    readings.setdefault(_reading(cell), []).append(cell)
  result = []
  for of_reading in readings.values():
    pack = []
    for cell in sorted(of_reading, key=_size, reverse=True):
      more = [*pack, cell]
      too_many = most and len(more) > most
      if pack and (too_many or not _fits(more, device_bytes, latent)):
        result.append(pack)
        more = [cell]
      pack = more
    result.append(pack)
  return sorted(result, key=lambda pack: sum(map(_work, pack)), reverse=True)


def _fits(cells: Sequence[Cell], device_bytes: int | None, latent: int) -> bool:
  if device_bytes is None:
    return True
  states = [memory.state_bytes(cell.config) // latent for cell in cells]
  return sum(states) + _GRADIENTS * max(states) <= _SHARE * device_bytes


def _reading(cell: Cell) -> tuple:
  shared = config_lib.names_with(TrainConfig, 'shared')
  values = config_lib.flat(cell.config)
  return cell.store, *(values[name] for name in shared)


def _size(cell: Cell) -> tuple[int, int]:
  return cell.config.steps, cell.config.sae.n_latents


def _work(cell: Cell) -> int:
  return cell.config.steps * cell.config.sae.n_latents
