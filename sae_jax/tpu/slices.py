"""Slices of TPU chips: their shapes, and the figures of their devices."""

from collections.abc import Sequence
import dataclasses
import difflib
import functools
import math
import re

import jax

from sae_jax import errors
from sae_jax.tpu import aot
from sae_jax.tpu.chips import Chip, CHIPS

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_PARTS_OF_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_LONGEST = 40
# Accelerator types, such as 'v5p-16': the chip, and what the number counts for
# each, its TensorCores or itself.
_TYPES = {
  'v2': ('v2', 2),
  'v3': ('v3', 2),
  'v4': ('v4', 2),
  'v5e': ('v5e', 1),
  'v5litepod': ('v5e', 1),
  'v5p': ('v5p', 2),
  'v6e': ('v6e', 1),
  'tpu7x': ('tpu7x', 2),
}
# Types of machines, such as 'ct6e-standard-4t': hosts of so many chips.
_MACHINES = {
  'ct4p-hightpu': 'v4',
  'ct5lp-hightpu': 'v5e',
  'ct5p-hightpu': 'v5p',
  'ct6e-standard': 'v6e',
  'tpu7x-standard': 'tpu7x',
}


@dataclasses.dataclass(frozen=True)
class Slices:
  """Devices to plan for: one or more slices of one shape.

  Attributes:
    chip: the version, a key of `chips.CHIPS`.
    shape: chips of a slice along each dimension of its torus.
    count: how many slices.
    devices: as JAX sees them, for compilation alone.
  """

  chip: str
  shape: tuple[int, ...]
  count: int
  devices: tuple[jax.Device, ...]

  @property
  def name(self) -> str:
    """As written: 'v6e:16x16'."""
    return name(self.chip, self.shape)

  @property
  def chips(self) -> int:
    """Chips of all slices."""
    return self.count * math.prod(self.shape)

  @property
  def devices_per_chip(self) -> int:
    """JAX devices of a chip: two on tpu7x, one elsewhere."""
    return len(self.devices) // self.chips

  @property
  def device(self) -> Chip:
    """The chip's figures, of one of its devices."""
    chip, share = CHIPS[self.chip], self.devices_per_chip
    rates = ('flops', 'hbm_gib', 'hbm_bandwidth', 'ici_bandwidth')
    return dataclasses.replace(
      chip,
      **{key: getattr(chip, key) / share for key in (*rates, 'dcn_bandwidth')},
    )

  @property
  def hbm_limit(self) -> float:
    """Bytes of HBM of a device that a program can use."""
    return self.device.hbm_gib * 2**30


def name(chip: str, shape: Sequence[int]) -> str:
  """A slice's name, 'v6e:16x16'."""
  return f'{chip}:{"x".join(map(str, shape))}'


@functools.cache
def offered(chip: str) -> tuple[tuple[int, ...], ...]:
  """The shapes of slices of a chip, by number of chips, the most compact first.

  2-D ones are those of the page; 3-D ones are parts of a cube of 4x4x4 chips,
  or made of whole cubes.
  """
  if CHIPS[chip].dimensions == 2:
    return _FLAT
  most_cubes = CHIPS[chip].most_chips // 64
  cubes = [
    (4 * a, 4 * b, 4 * c)
    for a in range(1, most_cubes + 1)
    for b in range(a, most_cubes // a + 1)
    for c in range(b, most_cubes // (a * b) + 1)
  ]
  return tuple(
    sorted((*_PARTS_OF_A_CUBE, *cubes), key=lambda s: (math.prod(s), max(s)))
  )


def nearest(chip: str, chips: float) -> tuple[int, ...]:
  """The smallest slice with at least `chips` chips, or the largest there is."""
  largest = math.prod(offered(chip)[-1])
  least = min(chips, largest)
  return next(s for s in offered(chip) if math.prod(s) >= least)


def find(topology: str, num_slices: int = 1) -> Slices:
  """The slices of a name such as 'v6e:16x16'.

  Args:
    topology: chip and shape of a slice; also as Google Cloud names it, by
      accelerator type ('v5litepod-16') or by the machine of a host
      ('ct6e-standard-4t'), of which the most compact slice is taken.
    num_slices: how many of them.

  Raises:
    UserError: if there is no such slice; it names the closest one.
  """
  if num_slices < 1:
    raise errors.UserError(f'num_slices {num_slices} must be 1 or more: use 1')
  if len(topology) > _LONGEST:
    raise errors.UserError(
      f'topology {topology!r} is too long for a name: write v6e:16x16'
    )
  chip, dims = _parts(topology)
  if chip not in CHIPS:
    near = difflib.get_close_matches(chip, CHIPS, 1, 0)[0]
    raise errors.UserError(
      f'topology {topology!r}: chip {chip!r} is not known, there are '
      f'{", ".join(CHIPS)}: use {name(near, _closest(near, _numbers(dims)))}'
    )
  shape = _numbers(dims)
  if CHIPS[chip].dimensions == 3 and len(shape) == 2:
    shape = (*shape, 1)
  known = {tuple(sorted(s)) for s in offered(chip)}
  if not re.fullmatch(r'\d+(x\d+)*', dims) or tuple(sorted(shape)) not in known:
    raise errors.UserError(
      f'topology {topology!r}: there is no such slice of {chip}: use '
      f'{name(chip, _closest(chip, shape))}{_several(chip, shape)}'
    )
  return Slices(chip, shape, num_slices, _devices(chip, shape, num_slices))


def _parts(topology: str) -> tuple[str, str]:
  """Chip and dimensions of a name, '4x4', or the number of chips if none fits.

  Raises:
    UserError: if it is of a part of a chip.
  """
  machine = re.fullmatch(r'(.+)-(\d+)t', topology)
  if machine and machine[1] in _MACHINES:
    return _of_chips(_MACHINES[machine[1]], int(machine[2]))
  kind, *rest = re.split('([:-])', topology, maxsplit=1)
  separator, rest = rest or ('', '')
  chip, counted = _TYPES.get(kind, (kind, 1))
  if separator != '-' or not rest.isdecimal():
    return chip, rest
  number = int(rest)
  if number % counted:
    raise errors.UserError(
      f'topology {topology!r}: the number counts TensorCores, two a chip: use '
      f'{kind}-{number + 1}'
    )
  return _of_chips(chip, number // counted)


def _of_chips(chip: str, chips: int) -> tuple[str, str]:
  if chip not in CHIPS or math.prod(nearest(chip, chips)) != chips:
    return chip, str(chips)
  return chip, 'x'.join(map(str, nearest(chip, chips)))


def _numbers(dims: str) -> tuple[int, ...]:
  return tuple(map(int, re.findall(r'\d+', dims)))


def _closest(chip: str, shape: Sequence[int]) -> tuple[int, ...]:
  """The slice of at least as many chips whose sides differ least."""
  chips = math.prod(shape)
  size = math.prod(nearest(chip, chips))
  sides = sorted(shape)

  def differs(other):
    return sum(abs(a - b) for a, b in zip(sorted(other), sides))

  same = [s for s in offered(chip) if math.prod(s) == size]
  return min(same, key=differs)


def _several(chip: str, shape: Sequence[int]) -> str:
  """The flag to add if one slice is not enough, else ''."""
  count = -(-math.prod(shape) // CHIPS[chip].most_chips)
  return f' --num_slices={count}' if count > 1 else ''


def _devices(
  chip: str, shape: Sequence[int], num_slices: int
) -> tuple[jax.Device, ...]:
  try:
    return tuple(aot.devices(name(chip, shape), num_slices))
  except errors.UserError as error:
    if 'pip install' in str(error):
      raise
    raise errors.UserError(
      f'{error}: use {name(chip, nearest(chip, math.prod(shape) + 1))}'
    ) from error
