"""Plans a sweep for TPUs that are not here.

The time of a step at the corners of the grid is that of the compiled program;
of all other shapes it is that of `closed`, which must agree with the corners.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import itertools
import math

from jax.sharding import Mesh

from sae_jax import errors
from sae_jax.plan import closed, meshes, planner, roofline, steps
from sae_jax.plan.record import GIB
from sae_jax.plan.sweep_record import Group, Shape, SweepPlan
from sae_jax.sweeps import packs as packs_lib
from sae_jax.sweeps.grid import Cell
from sae_jax.tpu import slices as slices_lib
from sae_jax.tpu.slices import Slices
from sae_jax.training import memory
from sae_jax.training.config import TrainConfig

# The most by which closed forms may be off at a corner: a share of the time of
# the compiled step, and of a chip's HBM by which it may need more.
TOLERANCE = 0.05


def plan(
  cells: Sequence[Cell],
  topology: str,
  num_slices: int = 1,
  mesh: str | tuple[int, int] = 'auto',
  *,
  case: str = '',
  most_meshes: int = 1,
  runs_at_a_time: int = 0,
  every_shape: bool = False,
  price_per_chip_hour: float = 0.0,
  report: Callable[[str], None] = lambda line: None,
) -> SweepPlan:
  """What the runs of a sweep would take of TPUs that are not here.

  Args:
    cells: the runs, with d_model.
    topology: a slice such as 'v6e:8x8'.
    num_slices: number of such slices, which work as one mesh.
    mesh: shards of batch and latents for all runs; 'auto' to choose, see
      `_chosen`.
    case: dead latents that AuxK works on, see `planner.plan`.
    most_meshes: the most meshes that are chosen.
    runs_at_a_time: most runs that share a reading; 0 for as many as fit.
    every_shape: compiles all shapes, not only the corners of each mesh.
    price_per_chip_hour: price of a chip for an hour; 0 for no cost.
    report: called with a line of text before and after each compilation.

  Raises:
    UserError: if there is no such slice, a run fits no mesh of it, or closed
      forms are off by more than `TOLERANCE` at a corner.
  """
  if not 0 <= price_per_chip_hour < math.inf:
    raise errors.UserError(
      f'price_per_chip_hour {price_per_chip_hour:g} must be 0 or more'
    )
  if most_meshes < 1:
    raise errors.UserError(f'most_meshes {most_meshes} must be 1 or more')
  slices = slices_lib.find(topology, num_slices)
  case = case or steps.training.CASES[0]
  groups, shapes = [], []
  for made, own in _by_mesh(cells, slices, mesh, case, most_meshes):
    of = _shapes(own, slices, made, case)
    chosen = of if every_shape else corners(of)
    of |= {
      key: _compiled(shape, slices, case, report)
      for key, shape in chosen.items()
    }
    if not every_shape:
      check(of.values(), slices)
    shapes += of.values()
    groups += _groups(own, of, slices, made, runs_at_a_time)
  return SweepPlan(
    slices, case, tuple(groups), tuple(shapes), price_per_chip_hour
  )


def _by_mesh(
  cells, slices, mesh, case, most
) -> Iterator[tuple[Mesh, list[Cell]]]:
  """Meshes, fewest shards of latents first, each with its cells."""
  if mesh != 'auto':
    made = meshes.make_mesh(slices, *mesh)
    for cell in cells:
      steps.of(cell.config).check_mesh(cell.config, made)
    yield made, list(cells)
    return
  chosen = _chosen(cells, slices, case, most)
  for sizes in sorted(set(chosen.values()), key=lambda sizes: sizes[1]):
    own = [c for c in cells if chosen[c.config.sae.n_latents] == sizes]
    yield meshes.make_mesh(slices, *sizes), own


def _chosen(
  cells: Sequence[Cell], slices: Slices, case: str, most: int
) -> dict[int, tuple[int, int]]:
  """The mesh of each number of latents.

  They are those of at most `most` meshes with which all runs take least time
  by closed forms: each mesh is a command of its own, and has corners to
  compile.
  """
  widths = {}
  for cell in cells:
    widths.setdefault(cell.config.sae.n_latents, []).append(cell)
  seconds = {
    width: _seconds_by_mesh(width, own, slices, case)
    for width, own in sorted(widths.items())
  }
  possible = sorted({sizes for by in seconds.values() for sizes in by})
  best = None
  for count in range(1, most + 1):
    for some in itertools.combinations(possible, count):
      total = sum(
        min(by.get(sizes, math.inf) for sizes in some)
        for by in seconds.values()
      )
      if best is None or total < best[0]:
        best = total, some
  if best is None or best[0] == math.inf:
    raise errors.UserError(
      f'the runs share no {most} meshes of {slices.name}: use more most_meshes'
    )
  return {
    width: min(best[1], key=lambda sizes: by.get(sizes, math.inf))
    for width, by in seconds.items()
  }


def _seconds_by_mesh(
  width, cells, slices, case
) -> dict[tuple[int, int], float]:
  """Seconds of all runs of a number of latents, on each mesh that has room."""
  totals = {}
  for sizes in meshes.allowed(cells[0].config, slices):
    made = meshes.make_mesh(slices, *sizes)
    try:
      of = _shapes(cells, slices, made, case)
    except errors.UserError:
      # A kernel has no room for as many active latents.
      continue
    if max(shape.form_bytes for shape in of.values()) <= slices.hbm_limit:
      totals[sizes] = sum(of[_key(cell.config)].seconds(cell) for cell in cells)
  if not totals:
    raise errors.UserError(
      f'a run of {width:,} latents in batches of '
      f'{cells[0].config.batch_size:,} tokens fits no mesh of {slices.name}: '
      'use a larger slice'
    )
  return totals


def _key(config: TrainConfig) -> tuple:
  """What the time of a step depends on, its mesh aside."""
  return (
    config.sae, config.objective, config.batch_size, config.micro_batches
  )  # fmt: skip


def _shapes(
  cells: Sequence[Cell], slices: Slices, mesh: Mesh, case: str
) -> dict[tuple, Shape]:
  """The shapes of steps on a mesh by their keys, by closed forms."""
  data, latent = mesh.shape['data'], mesh.shape['latent']
  shapes = {}
  for cell in cells:
    key = _key(cell.config)
    if key not in shapes:
      config = dataclasses.replace(
        cell.config, mesh_data=data, mesh_latent=latent
      )
      sizes = closed.sizes(config, slices, mesh, case)
      shapes[key] = Shape(
        config,
        sizes.implementation,
        roofline.roofline(closed.costs(sizes, slices, mesh), slices, mesh),
        closed.hbm_bytes(sizes),
      )
  return shapes


def corners(shapes: Mapping[tuple, Shape]) -> dict[tuple, Shape]:
  """The shapes of the least and greatest k at least and greatest n_latents.

  And where no corner has an implementation of the products that a shape has,
  the largest such shape. Shapes that differ in more than n_latents and k have
  corners of their own.

  Args:
    shapes: of one mesh, by any keys.
  """
  alike = {}
  for key, shape in shapes.items():
    config = shape.config
    sae = dataclasses.replace(config.sae, n_latents=1, k=1)
    rest = sae, config.objective, config.batch_size, config.micro_batches
    alike.setdefault(rest, {})[key] = shape
  chosen = {}
  for own in alike.values():
    ends = {}
    for width in _ends(shape.config.sae.n_latents for shape in own.values()):
      row = {k: s for k, s in own.items() if s.config.sae.n_latents == width}
      least, greatest = _ends(s.config.sae.k for s in row.values())
      for key, shape in row.items():
        if shape.config.sae.k in (least, greatest):
          ends[key] = shape
    missing = {s.implementation for s in own.values()}
    missing -= {s.implementation for s in ends.values()}
    for name in sorted(missing):
      key = max(
        (key for key, s in own.items() if s.implementation == name),
        key=lambda key: own[key].config.sae.n_latents * own[key].config.sae.k,
      )
      ends[key] = own[key]
    chosen |= ends
  return chosen


def _ends(values: Iterable[int]) -> tuple[int, int]:
  values = sorted(values)
  return values[0], values[-1]


def _compiled(
  shape: Shape,
  slices: Slices,
  case: str,
  report: Callable[[str], None],
) -> Shape:
  """The shape with its step compiled.

  Raises:
    UserError: if it does not fit, or the step refuses the mesh.
  """
  config = shape.config
  at = _at(shape)
  report(f'compiling {at} ...')
  made = planner.plan(
    config,
    slices.name,
    slices.count,
    (config.mesh_data, config.mesh_latent),
    case=case,
    compiles=1,
  )
  report(f'compiled in {made.compile_s:.0f} s')
  if not made.fits:
    remedy = made.remedies[0].flags if made.remedies else 'a larger slice'
    raise errors.UserError(
      f'{at} needs {made.footprint.total / GIB:.2f} GiB of '
      f'{slices.hbm_limit / GIB:.2f} on a device: use {remedy}'
    )
  return dataclasses.replace(shape, compiled=made)


def check(shapes: Iterable[Shape], slices: Slices) -> None:
  """Refuses closed forms that do not agree with the compiled steps.

  Args:
    shapes: compiled ones, and others.
    slices: the chips.

  Raises:
    UserError: if a time is off by more than `TOLERANCE`, or the compiled step
      needs more memory by that share of a chip's.
  """
  for shape in shapes:
    if shape.compiled is None:
      continue
    if abs(shape.off) > TOLERANCE:
      raise errors.UserError(
        f'closed forms are off by {shape.off:+.1%}, more than '
        f'{TOLERANCE:.0%}, at {_at(shape)}: '
        f'{1e3 * shape.form.step_s:.3f} ms, compiled '
        f'{1e3 * shape.compiled.roofline.step_s:.3f}: use --every_shape, which '
        'compiles all shapes'
      )
    more = shape.compiled.footprint.total - shape.form_bytes
    if more > TOLERANCE * slices.hbm_limit:
      raise errors.UserError(
        f'{_at(shape)} needs {more / GIB:.2f} GiB more than by closed forms, '
        f'above {TOLERANCE:.0%} of the HBM of a device: use --every_shape, '
        'which compiles all shapes'
      )


def _at(shape: Shape) -> str:
  config = shape.config
  return (
    f'n_latents {config.sae.n_latents:,}, k {config.sae.k:,} on mesh '
    f'{config.mesh_data}x{config.mesh_latent}'
  )


def _groups(
  cells: Sequence[Cell],
  shapes: Mapping[tuple, Shape],
  slices: Slices,
  mesh: Mesh,
  most: int,
) -> list[Group]:
  """The runs that share a reading, as a worker packs them."""
  latent = mesh.shape['latent']
  groups = []
  for pack in packs_lib.packs(cells, int(slices.hbm_limit), latent, most):
    of = tuple(shapes[_key(cell.config)] for cell in pack)
    states = [memory.state_bytes(cell.config) // latent for cell in pack]
    # One run at a time has arrays beside its state, and the batch.
    beside = max(shape.hbm_bytes - own for shape, own in zip(of, states))
    groups.append(Group(tuple(pack), of, sum(states) + beside))
  return groups
