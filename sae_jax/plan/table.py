"""A plan as text to read."""

from collections.abc import Iterator, Sequence

from sae_jax.plan import roofline, steps
from sae_jax.plan.program.costs import Buffer
from sae_jax.plan.record import GIB, NOTHING_MEASURED, Plan

_NAMES = {
  'temporaries': 'temporaries',
  'program': 'program',
  'padding': 'padding, results',
}
_BUFFERS = 4
# Parts below this share of the step are added up in one row.
_SMALL = 0.002


def lines(plan: Plan) -> Iterator[str]:
  """The plan as lines of text for a person."""
  yield NOTHING_MEASURED
  yield ''
  yield from _run(plan)
  yield ''
  yield from _verdict(plan)
  yield ''
  yield from _memory(plan)
  yield ''
  yield from _times(plan)
  if plan.roofline.exchanges:
    yield ''
    yield from _exchanges(plan)
  yield ''
  yield from _step(plan)
  if plan.kernels:
    yield ''
    yield from _kernels(plan)
  yield ''
  yield from _buffers(plan)
  if len(plan.meshes) > 1:
    yield ''
    yield from _meshes(plan)
  yield ''
  yield 'what this assumes'
  for text in (*roofline.ASSUMPTIONS, *_own_assumptions(plan)):
    yield from wrapped(text)


def _run(plan: Plan) -> Iterator[str]:
  config, slices = plan.config, plan.slices
  several = f'{slices.count} slices of ' if slices.count > 1 else ''
  cores = f', {len(slices.devices)} devices' * (slices.devices_per_chip > 1)
  yield (
    f'{several}{slices.name}, {slices.chips:,} chips{cores}, '
    f'mesh {config.mesh_data}x{config.mesh_latent} (data x latent)'
  )
  yield (
    f'd {config.sae.d_model:,}, n {config.sae.n_latents:,}, '
    f'k {config.sae.k:,}, batch {config.batch_size:,} tokens, '
    f'{steps.of(config).settings(config)}'
  )


def _verdict(plan: Plan) -> Iterator[str]:
  share = plan.slices.devices_per_chip
  needs = share * plan.footprint.total / GIB
  room = share * plan.slices.hbm_limit / GIB
  of = f'{needs:.2f} of {room:.2f} GiB of HBM per chip'
  if plan.fits:
    yield f'FITS: {of}, {room - needs:.2f} GiB to spare'
    return
  yield f'DOES NOT FIT: {of}, {needs - room:.2f} GiB too much'
  if not plan.remedies:
    yield '  nothing was found that fits: fewer latents or a larger slice'
    return
  yield from aligned(
    ('what fits', 'GiB', ''),
    [
      (
        remedy.flags,
        f'{share * remedy.hbm_bytes / GIB:.2f}',
        'compiled' if remedy.compiled else 'by arithmetic, not compiled',
      )
      for remedy in plan.remedies
    ],
    '<><',
  )


def _memory(plan: Plan) -> Iterator[str]:
  share = plan.slices.devices_per_chip
  names = steps.of(plan.config).ARGUMENTS | _NAMES
  rows = [
    (names[key], f'{share * size / GIB:.3f}')
    for key, size in plan.footprint.parts.items()
  ]
  total = f'{share * plan.footprint.total / GIB:.3f}'
  yield from aligned(('HBM per chip', 'GiB'), [*rows, ('all', total)], '<>')


def _times(plan: Plan) -> Iterator[str]:
  bound = plan.roofline
  rows, small = [], [0.0] * 5
  for part in bound.parts:
    figures = (
      part.seconds,
      part.compute_s,
      part.memory_s,
      part.flops,
      part.hbm_bytes,
    )
    if part.seconds < _SMALL * bound.parts_s:
      small = [a + b for a, b in zip(small, figures)]
    else:
      rows.append(_part(part.name, *figures))
  if any(small):
    rows.append(_part('smaller parts', *small))
  whole = plan.costs.total
  rows.append(
    (
      'all',
      _ms(bound.parts_s),
      _ms(sum(part.compute_s for part in bound.parts)),
      _ms(sum(part.memory_s for part in bound.parts)),
      f'{whole.flops / 1e12:,.3f}',
      f'{whole.hbm_bytes / GIB:,.3f}',
    )
  )
  yield from aligned(
    ('a step, per device', 'ms', 'products', 'HBM', 'TFLOP', 'HBM GiB'),
    rows,
    '<>>>>>',
  )


def _part(name, seconds, compute, memory, flops, hbm) -> tuple[str, ...]:
  return (
    name,
    _ms(seconds),
    _ms(compute),
    _ms(memory),
    f'{flops / 1e12:,.3f}',
    f'{hbm / GIB:,.3f}',
  )


def _exchanges(plan: Plan) -> Iterator[str]:
  rows = [
    (
      f'{e.kind} over {e.axis}' if e.axis else e.kind,
      _ms(e.seconds),
      e.over,
      f'{e.count:,.0f}',
      f'{e.put_in_bytes / 2**20:,.2f}',
      f'{e.link_bytes / 2**20:,.2f}',
    )
    for e in plan.roofline.exchanges
  ]
  ends = ('all', _ms(plan.roofline.exchanges_s), '', '', '', '')
  yield from aligned(
    ('exchanges, per device', 'ms', 'links', 'times', 'MiB in', 'MiB sent'),
    [*rows, ends],
    '<><>>>',
  )


def _step(plan: Plan) -> Iterator[str]:
  bound = plan.roofline
  yield (
    f'roofline of a step: {_ms(bound.step_s)} ms if all exchanges are hidden, '
    f'{_ms(bound.without_overlap_s)} ms if none is'
  )
  yield f'tokens/s: at most {plan.tokens_per_s:,.0f}'
  yield from steps.of(plan.config).lines(plan)
  if plan.tokens:
    cost = ''
    if plan.price_per_chip_hour:
      cost = (
        f', cost at least {plan.cost:,.2f} at {plan.price_per_chip_hour:g} a '
        'chip and hour'
      )
    yield f'{plan.tokens:,} tokens: at least {plan.hours:,.2f} hours{cost}'


def _kernels(plan: Plan) -> Iterator[str]:
  yield from aligned(
    ('Pallas kernels', 'calls', 'TFLOP a call', 'HBM GiB', ''),
    [
      (
        kernel.name,
        f'{calls:,.0f}',
        f'{kernel.flops / 1e12:,.4f}',
        f'{kernel.hbm_bytes / GIB:,.4f}',
        'by its cost_estimate'
        if kernel.declared
        else 'no cost_estimate: operands and results, no arithmetic',
      )
      for kernel, calls in plan.kernels
    ],
    '<>>><',
  )


def _buffers(plan: Plan) -> Iterator[str]:
  each = (
    f'a device works on {plan.codes:,} values of tokens x latents at a time'
  )
  if not plan.dense:
    largest = plan.largest and f'; the largest: {_buffer(plan.largest)}'
    yield f'{each}: no buffer is as large{largest or ""}'
    return
  yield f'{each}: {len(plan.dense)} buffers are as large, among them'
  for buffer in plan.dense[:_BUFFERS]:
    yield f'  {_buffer(buffer)}'


def _buffer(buffer: Buffer) -> str:
  size = buffer.shape.nbytes / GIB
  return f'{buffer.shape} ({size:.3f} GiB, {buffer.part})'


def _meshes(plan: Plan) -> Iterator[str]:
  share = plan.slices.devices_per_chip
  yield from aligned(
    ('meshes, data x latent', 'GiB', 'ms', '', ''),
    [
      (
        f'{mesh.data}x{mesh.latent}',
        f'{share * mesh.hbm_bytes / GIB:.2f}',
        _ms(mesh.step_s),
        'fits' if mesh.fits else 'does not fit',
        'the step refuses it'
        if mesh.refused
        else 'compiled'
        if mesh.compiled
        else 'a guess, not compiled',
      )
      for mesh in plan.meshes
    ],
    '<>><<',
  )


def _own_assumptions(plan: Plan) -> Iterator[str]:
  chip = plan.slices.device
  yield (
    f'a device has {chip.flops / 1e12:,.0f} TFLOP/s, '
    f'{chip.hbm_bandwidth / 1e9:,.0f} GB/s of HBM, '
    f'{chip.ici_bandwidth / 1e9:,.0f} GB/s out over its links, '
    f'{chip.dcn_bandwidth / 1e9:,.2f} GB/s between slices (published)'
  )
  yield from steps.of(plan.config).assumptions(plan)
  if any(not branch.choice for branch in plan.costs.branches):
    yield 'of other choices of the program the cheapest branch is taken'
  if plan.loops_s:
    each = [f'{_ms(seconds)} ms' for seconds in plan.loops_s]
    yield (
      'loops whose length depends on data, as of tokens that are computed '
      f'again, are left out; a run of each takes {", ".join(each)}'
    )


def _ms(seconds: float) -> str:
  return f'{1e3 * seconds:,.3f}'


def aligned(
  header: Sequence[str], rows: Sequence[Sequence[str]], sides: str
) -> Iterator[str]:
  """A header and indented rows; a side of '<' or '>' aligns each column."""
  indented = [(f'  {row[0]}', *row[1:]) for row in rows]
  widths = [max(map(len, column)) for column in zip(header, *indented)]
  for row in (header, *indented):
    cells = [
      f'{cell:{side}{width}}' for cell, side, width in zip(row, sides, widths)
    ]
    yield '  '.join(cells).rstrip()


def wrapped(text: str) -> Iterator[str]:
  """A point of a list, broken into lines of at most 80 columns."""
  line = '  -'
  for word in text.split():
    if len(line) + 1 + len(word) > 80:
      yield line
      line = '   '
    line += ' ' + word
  yield line
