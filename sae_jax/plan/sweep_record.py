"""The plan of a sweep: its figures, and they as JSON."""

import dataclasses
from typing import Any

from sae_jax.plan import roofline as roofline_lib
from sae_jax.plan.record import described_chip, GIB, NOTHING_MEASURED, Plan
from sae_jax.plan.roofline import Roofline
from sae_jax.sweeps import cost
from sae_jax.sweeps.grid import Cell
from sae_jax.tpu.slices import Slices
from sae_jax.training import defaults
from sae_jax.training.config import TrainConfig

# Of an activation in a store.
_ACTIVATION_BYTES = 2


@dataclasses.dataclass(frozen=True)
class Shape:
  """A training step of one shape on one mesh.

  Attributes:
    config: a run of this shape, with its mesh.
    implementation: of its sparse products.
    form: the step's time by closed forms.
    form_bytes: HBM that a device needs by closed forms.
    compiled: the compiled step; None where closed forms stand for it.
  """

  config: TrainConfig
  implementation: str
  form: Roofline
  form_bytes: float
  compiled: Plan | None = None

  @property
  def step_s(self) -> float:
    """The least seconds of a step, by the compiled program if there is one."""
    return (self.compiled.roofline if self.compiled else self.form).step_s

  @property
  def off(self) -> float | None:
    """By which share of the compiled step's time closed forms are off."""
    if self.compiled is None:
      return None
    return self.form.step_s / self.compiled.roofline.step_s - 1

  @property
  def hbm_bytes(self) -> float:
    """HBM that a device needs, by the compiler if it was asked."""
    return self.compiled.footprint.total if self.compiled else self.form_bytes

  def seconds(self, cell: Cell) -> float:
    """The least seconds of all steps of a run of this shape."""
    return cell.config.steps * self.step_s


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs that are trained on one reading of a store.

  Attributes:
    cells: the runs.
    shapes: the shape of each.
    hbm_bytes: HBM that a device needs with the states of all of them.
  """

  cells: tuple[Cell, ...]
  shapes: tuple[Shape, ...]
  hbm_bytes: float

  @property
  def mesh(self) -> tuple[int, int]:
    """Shards of the batch and of the latents."""
    config = self.shapes[0].config
    return config.mesh_data, config.mesh_latent

  @property
  def hours(self) -> float:
    """The fewest hours: a step of each run in turn on every batch."""
    pairs = zip(self.shapes, self.cells)
    return sum(shape.seconds(cell) for shape, cell in pairs) / 3600

  @property
  def flops(self) -> float:
    """Operations with sparse products, see `cost.spent`."""
    return sum(cost.spent(cell.config) for cell in self.cells)

  @property
  def dense_flops(self) -> float:
    """Operations as of dense codes, see `cost.dense_equivalent`."""
    return sum(cost.dense_equivalent(cell.config) for cell in self.cells)

  @property
  def read_bytes(self) -> int:
    """Bytes of activations that the longest run has, which all share."""
    return max(
      defaults.tokens(cell.config) * cell.config.sae.d_model
      for cell in self.cells
    ) * _ACTIVATION_BYTES  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SweepPlan:
  """What a sweep would take, by compiler and arithmetic; nothing is measured.

  Attributes:
    slices: the chips.
    case: dead latents that AuxK is assumed to work on.
    groups: of runs, in the order of their meshes.
    shapes: all shapes.
    price_per_chip_hour: 0 where none was given.
  """

  slices: Slices
  case: str
  groups: tuple[Group, ...]
  shapes: tuple[Shape, ...]
  price_per_chip_hour: float = 0.0

  @property
  def runs(self) -> int:
    """How many there are."""
    return sum(len(group.cells) for group in self.groups)

  @property
  def hours(self) -> float:
    """The fewest hours of all groups, one after another on all chips."""
    return sum(group.hours for group in self.groups)

  @property
  def chip_hours(self) -> float:
    """The same times the chips."""
    return self.hours * self.slices.chips

  @property
  def cost(self) -> float:
    """The least cost, in the currency of the price."""
    return self.chip_hours * self.price_per_chip_hour

  @property
  def corners(self) -> tuple[Shape, ...]:
    """The shapes that were compiled."""
    return tuple(shape for shape in self.shapes if shape.compiled)

  @property
  def most_off(self) -> float:
    """The largest disagreement of closed forms with a compiled step."""
    return max((abs(shape.off) for shape in self.corners), default=0.0)

  def fits(self, group: Group) -> bool:
    """Whether a group's states and one step are in HBM together."""
    return group.hbm_bytes <= self.slices.hbm_limit

  def to_dict(self) -> dict[str, Any]:
    """All figures, for JSON."""
    share = self.slices.devices_per_chip
    figures = {
      'measured': False,
      'note': NOTHING_MEASURED,
      'topology': self.slices.name,
      'num_slices': self.slices.count,
      'chips': self.slices.chips,
      'runs': self.runs,
      'dead_latents': self.case,
      'hours_at_least': self.hours,
      'chip_hours_at_least': self.chip_hours,
      'flops_spent': sum(group.flops for group in self.groups),
      'flops_dense_equivalent': sum(g.dense_flops for g in self.groups),
      'closed_forms_most_off': self.most_off,
    }
    if self.price_per_chip_hour:
      figures['price_per_chip_hour'] = self.price_per_chip_hour
      figures['cost_at_least'] = self.cost
    return figures | {
      'groups': [self._group(group) for group in self.groups],
      'compiled': [_corner(shape, share) for shape in self.corners],
      'hbm_limit_per_chip_gib': share * self.slices.hbm_limit / GIB,
      'chip': described_chip(self.slices),
      'assumptions': list(roofline_lib.ASSUMPTIONS),
      'config': dataclasses.asdict(self.shapes[0].config),
    }

  def _group(self, group: Group) -> dict[str, Any]:
    share = self.slices.devices_per_chip
    return {
      'mesh': list(group.mesh),
      'hbm_per_chip_gib': share * group.hbm_bytes / GIB,
      'fits': self.fits(group),
      'hours_at_least': group.hours,
      'chip_hours_at_least': group.hours * self.slices.chips,
      'flops_spent': group.flops,
      'flops_dense_equivalent': group.dense_flops,
      'bytes_of_the_store': group.read_bytes,
      'runs': [
        {
          'name': cell.name,
          'n_latents': cell.config.sae.n_latents,
          'k': cell.config.sae.k,
          'tokens': defaults.tokens(cell.config),
          'roofline_step_s': shape.step_s,
          'compiled': shape.compiled is not None,
          'hours_at_least': shape.seconds(cell) / 3600,
        }
        for cell, shape in zip(group.cells, group.shapes)
      ],
    }


def _corner(shape: Shape, share: int) -> dict[str, Any]:
  plan = shape.compiled
  return {
    'mesh': [shape.config.mesh_data, shape.config.mesh_latent],
    'n_latents': shape.config.sae.n_latents,
    'k': shape.config.sae.k,
    'fits': plan.fits,
    'off': shape.off,
    'compiled': _figures(plan.roofline)
    | {'hbm_per_chip_gib': share * plan.footprint.total / GIB},
    'closed_forms': _figures(shape.form)
    | {'hbm_per_chip_gib': share * shape.form_bytes / GIB},
  }


def _figures(bound: Roofline) -> dict[str, Any]:
  return {
    'roofline_step_s': bound.step_s,
    'roofline_without_overlap_s': bound.without_overlap_s,
    'exchanges_s': bound.exchanges_s,
    'flops_per_device': sum(part.flops for part in bound.parts),
    'hbm_bytes_per_device': sum(part.hbm_bytes for part in bound.parts),
    'link_bytes_per_device': sum(e.link_bytes for e in bound.exchanges),
    'parts_s': {part.name: part.seconds for part in bound.parts},
  }
