"""The plan of a sweep as text to read."""

from collections.abc import Iterator

from sae_jax.plan import roofline
from sae_jax.plan.record import GIB, NOTHING_MEASURED
from sae_jax.plan.sweep_record import SweepPlan
from sae_jax.plan.table import aligned, wrapped


def lines(plan: SweepPlan) -> Iterator[str]:
  """The plan as lines of text for a person."""
  yield NOTHING_MEASURED
  yield ''
  several = f'{plan.slices.count} slices of ' * (plan.slices.count > 1)
  config = plan.shapes[0].config
  yield (
    f'{several}{plan.slices.name}, {plan.slices.chips:,} chips; '
    f'{plan.runs:,} runs, d {config.sae.d_model:,}, batch '
    f'{config.batch_size:,} tokens'
  )
  yield ''
  yield from _groups(plan)
  yield ''
  yield from _total(plan)
  yield ''
  yield from _runs(plan)
  yield ''
  yield from _compiled(plan)
  yield ''
  yield 'what this assumes'
  for text in (
    *roofline.ASSUMPTIONS,
    f"AuxK's work is that of {plan.case} dead latents",
    'runs of a group take their steps one after another on each batch, which '
    'is there when it is wanted; reading, evaluations and checkpoints take no '
    'time',
  ):
    yield from wrapped(text)


def _groups(plan: SweepPlan) -> Iterator[str]:
  share = plan.slices.devices_per_chip
  rows = []
  for number, group in enumerate(plan.groups, 1):
    widths = sorted({cell.config.sae.n_latents for cell in group.cells})
    rows.append(
      (
        str(number),
        _mesh(group.mesh),
        str(len(group.cells)),
        f'{widths[0]:,} ... {widths[-1]:,}',
        f'{share * group.hbm_bytes / GIB:.2f}',
        '' if plan.fits(group) else 'does not fit',
        *_work(plan, group.hours, group.flops, group.dense_flops),
        f'{group.read_bytes / 1e12:,.2f}',
      )
    )
  whole = _work(
    plan,
    plan.hours,
    sum(group.flops for group in plan.groups),
    sum(group.dense_flops for group in plan.groups),
  )
  read = sum(group.read_bytes for group in plan.groups)
  rows.append(
    ('all', '', str(plan.runs), '', '', '', *whole, f'{read / 1e12:,.2f}')
  )
  yield from aligned(
    (
      'groups',
      'mesh',
      'runs',
      'latents',
      'GiB',
      '',
      'hours',
      'chip-hours',
      'operations',
      'if dense',
      'TB read',
    ),
    rows,
    '<<>>><>>>>>',
  )


def _work(plan, hours, flops, dense) -> tuple[str, ...]:
  return (
    f'{hours:,.2f}',
    f'{hours * plan.slices.chips:,.0f}',
    f'{flops:.2e}',
    f'{dense:.2e}',
  )


def _total(plan: SweepPlan) -> Iterator[str]:
  cost = ''
  if plan.price_per_chip_hour:
    cost = (
      f', cost at least {plan.cost:,.2f} at {plan.price_per_chip_hour:g} a '
      'chip and hour'
    )
  yield (
    f'all runs: at least {plan.hours:,.2f} hours, {plan.chip_hours:,.0f} '
    f'chip-hours{cost}'
  )
  for mesh in dict.fromkeys(group.mesh for group in plan.groups):
    widths = sorted(
      {
        cell.config.sae.n_latents
        for group in plan.groups
        if group.mesh == mesh
        for cell in group.cells
      }
    )
    yield (
      f'  --mesh_data={mesh[0]} --mesh_latent={mesh[1]} '
      f'--grid=n_latents={",".join(map(str, widths))}'
    )


def _runs(plan: SweepPlan) -> Iterator[str]:
  rows = [
    (
      cell.name,
      _mesh(group.mesh),
      f'{1e3 * shape.step_s:,.3f}',
      f'{shape.seconds(cell) / 3600:,.3f}',
      'compiled' if shape.compiled else 'closed forms',
    )
    for group in plan.groups
    for cell, shape in zip(group.cells, group.shapes)
  ]
  yield from aligned(('runs', 'mesh', 'ms a step', 'hours', ''), rows, '<<>><')


def _compiled(plan: SweepPlan) -> Iterator[str]:
  share = plan.slices.devices_per_chip
  yield (
    f'closed forms are off by {plan.most_off:.1%} at most, of the '
    f'{len(plan.corners)} steps that were compiled'
  )
  rows = [
    (
      f'n {shape.config.sae.n_latents:,}, k {shape.config.sae.k:,}',
      _mesh((shape.config.mesh_data, shape.config.mesh_latent)),
      f'{1e3 * shape.compiled.roofline.step_s:,.3f}',
      f'{1e3 * shape.form.step_s:,.3f}',
      f'{shape.off:+.1%}',
      f'{share * shape.compiled.footprint.total / GIB:.2f}',
      f'{share * shape.form_bytes / GIB:.2f}',
    )
    for shape in plan.corners
  ]
  header = ('compiled', 'mesh', 'ms', 'by forms', 'off', 'GiB', 'by forms')
  yield from aligned(header, rows, '<<>>>>>')


def _mesh(sizes: tuple[int, int]) -> str:
  return f'{sizes[0]}x{sizes[1]}'
