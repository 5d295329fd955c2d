"""Kernels against XLA and against what must be done, by the TPU's compiler.

For every chip, named shape and operation of a training step: the cycles that
the TPU compiler estimates, the bytes of HBM, the bound (the longer of the two
at the chip's clock and bandwidth), its ratio to the bound of XLA's way and to
the least that is possible, and the temporary HBM of both. NOTHING IS MEASURED:
there is no TPU here, and the estimate leaves out waiting for HBM. If it fails
for tokens that are encoded again, their product at the peak rate takes its
place. It is good to a tenth for products and to a factor of about three for
copies of single rows, enough to rank designs.

  python -m experiments.kernels.table --chip=v6e --json=kernels.json
"""

import dataclasses
from importlib import metadata
import json
import sys

from absl import app, flags
from etils import epath

from experiments.kernels import costs, estimate
from sae_jax.autoencoder import SaeConfig
from sae_jax.ops import dispatch
from sae_jax.ops.shapes import Shape, SHAPES
from sae_jax.plan import footprint, planner
from sae_jax.plan.program import parts as parts_lib
from sae_jax.tpu import aot
from sae_jax.tpu import slices as slices_lib
from sae_jax.tpu.chips import CHIPS
from sae_jax.training.config import TrainConfig
from sae_jax.training.objective import ObjectiveConfig

NOTE = (
  "nothing was measured: cycles are the TPU compiler's estimate, times are "
  'lower bounds from them and from bytes'
)


def _temporary(estimate) -> int | None:
  """Bytes of temporary HBM, None if the program does not compile."""
  return None if estimate.error else estimate.temporary


def _row(chip, shape, operation, results) -> dict:
  """One line of the table."""
  ours, theirs = (results[job] for job in operation.whole)
  kernel, xla = operation.kernel(results), operation.xla(results)
  bound, other = kernel.seconds(chip), xla.seconds(chip)
  peak = CHIPS[chip]
  least = max(
    operation.flops / peak.flops, operation.least_bytes / peak.hbm_bandwidth
  )
  moved = kernel.hbm_bytes / peak.hbm_bandwidth
  copies = operation.copies and operation.copies(results).seconds(chip)
  return {
    'chip': chip,
    'shape': shape.name,
    'operation': operation.name,
    'cycles': kernel.cycles and round(kernel.cycles),
    'hbm_bytes': round(kernel.hbm_bytes),
    'bound_s': bound,
    'bound_by': bound and ('bytes' if bound == moved else 'cycles'),
    'least_s': least,
    'over_least': bound and round(bound / least, 2),
    'copies_s': copies,
    'over_least_or_copies': bound and round(bound / max(least, copies or 0), 2),
    'no_estimate': kernel.reason,
    'xla_cycles': xla.cycles and round(xla.cycles),
    'xla_bound_s': other,
    'over_xla': bound and other and round(bound / other, 2),
    'xla_no_estimate': xla.reason,
    'temporary_bytes': _temporary(ours),
    'does_not_compile': ours.error,
    'xla_temporary_bytes': _temporary(theirs),
    'xla_does_not_compile': theirs.error,
  }


def _step(chip, shape, rows, results) -> dict:
  """The step's parts added up, beside the encoder's product."""
  peak = CHIPS[chip]
  product = 2 * shape.batch * shape.n_latents * shape.d_model / peak.flops
  parts = {row['operation']: row['bound_s'] for row in rows}
  known = all(parts.values())
  parts['rest'] = costs.rest_bytes(shape) / peak.hbm_bandwidth
  sort = results.get(costs.sort_job(chip, shape))
  if sort and not sort.error:
    parts['sort'] = sort.of() / (1e9 * CHIPS[chip].clock_ghz)
  return {
    'chip': chip,
    'shape': shape.name,
    'encoder_product_s': product,
    'step_s': sum(parts.values()) if known else None,
    'over_product': round(sum(parts.values()) / product, 2) if known else None,
    'sort_counted': 'sort' in parts,
    'parts_s': parts,
  }


# Where the temporary HBM of whole steps is compared.
STEP = {'d_model': 768, 'n_latents': 131_072, 'k': 32}
STEP_BATCH = 8192


def step_temporaries(chip: str) -> dict:
  """Temporary HBM of a training step on one chip, by implementation."""
  config = TrainConfig(sae=SaeConfig(**STEP), batch_size=STEP_BATCH)
  mesh, nbytes = aot.one_chip(chip), {}
  for name in dispatch.IMPLEMENTATIONS:
    compiled = footprint.compile_step(config, mesh, name)
    nbytes[name] = compiled.footprint.temporaries
  return {'chip': chip, **STEP, 'batch': STEP_BATCH, 'temporary_bytes': nbytes}


# Two SHAPES of one k at which dense codes are compared with kernels.
_CROSSING = ('32k', '128k')


def dense_seconds(chip: str, shape: Shape) -> float:
  """Bound of a step with dense codes, without the optimiser.

  It is the bound of its products and of its HBM traffic, by the compiled
  program, without the selection of the top k.
  """
  config = TrainConfig(
    sae=SaeConfig(d_model=shape.d_model, n_latents=shape.n_latents, k=shape.k),
    objective=ObjectiveConfig(k_aux=0),
    batch_size=shape.batch,
  )
  mesh = aot.one_chip(chip)
  compiled = footprint.compile_step(config, mesh, 'dense')
  slices = slices_lib.find(CHIPS[chip].topology, 1)
  parts = planner.read(config, slices, mesh, compiled, 'none').roofline.parts
  return sum(part.seconds for part in parts if part.name != parts_lib.OPTIMIZER)


def crossing(rows: list[dict], dense_s: float) -> float | None:
  """N / K from which on kernels are faster than dense codes, by the bounds.

  With dense codes time is in proportion to N, as is a part of the encoder's
  kernel. Its selection and the work on pairs do not depend on N.

  Args:
    rows: the table's rows of one chip.
    dense_s: `dense_seconds` of the first shape of `_CROSSING`.

  Returns:
    The ratio at their K, None where there is no estimate.
  """
  few, many = (
    {row['operation']: row['bound_s'] for row in rows if row['shape'] == name}
    for name in _CROSSING
  )
  shapes = {shape.name: shape for shape in SHAPES}
  first, last = (shapes[name] for name in _CROSSING)
  names = 'gather_sum', 'sampled_products', 'segment_sums'
  if not all(few.get(name) for name in ('encode_topk', *names)):
    return None
  each = (many['encode_topk'] - few['encode_topk']) / (
    last.n_latents - first.n_latents
  )
  # Sums fill the whole gradient, which dense products do too.
  fixed = few['encode_topk'] - each * first.n_latents
  fixed += sum(few[name] for name in names)
  return fixed / (dense_s / first.n_latents - each) / first.k


def crossover(chip: str, rows: list[dict]) -> dict:
  """`crossing` of a chip, and the figures that it follows from."""
  first = next(shape for shape in SHAPES if shape.name == _CROSSING[0])
  dense_s = dense_seconds(chip, first)
  own = [row for row in rows if row['chip'] == chip]
  return {
    'chip': chip,
    'dense_s': dense_s,
    'shape': first.name,
    'from_ratio': crossing(own, dense_s),
  }


def measure(chips, shapes, workers: int, report=None) -> dict:
  """The whole table.

  Args:
    chips: keys of `tpu.chips.CHIPS`.
    shapes: shapes of a chip's share of a step, as those of `ops.shapes`.
    workers: compilers at a time.
    report: see `estimate.run`.
  """
  operations = {
    (chip, shape): list(costs.operations(chip, shape))
    for chip in chips
    for shape in shapes
  }
  jobs = [
    job
    for of_shape in operations.values()
    for operation in of_shape
    for job in (*operation.jobs, *operation.whole)
  ]
  jobs += filter(None, (costs.sort_job(*key) for key in operations))
  results = estimate.run(jobs, workers, report)
  table, steps = [], []
  for (chip, shape), of_shape in operations.items():
    rows = [_row(chip, shape, operation, results) for operation in of_shape]
    table += rows
    steps.append(_step(chip, shape, rows, results))
  return {
    'measured': False,
    'note': NOTE,
    'versions': {
      name: metadata.version(name) for name in ('jax', 'jaxlib', 'libtpu')
    },
    'clocks_ghz': {chip: CHIPS[chip].clock_ghz for chip in chips},
    'shapes': [dataclasses.asdict(shape) for shape in shapes],
    'kernels': table,
    'steps': steps,
  }


def _mib(nbytes: int | None) -> str:
  return '-' if nbytes is None else f'{nbytes / 2**20:,.0f}'


def lines(report: dict):
  """The lines of the table as text, from the result of `measure`."""
  yield report['note']
  head = (
    *('chip', 'shape', 'operation', 'cycles'),
    *('bound ms', 'by', 'over least', 'or copies', 'over XLA'),
    *('MiB', 'XLA MiB'),
  )
  form = '{:6} {:10} {:17} {:>13} {:>10} {:>7} {:>10} {:>9} {:>8} {:>8} {:>9}'
  yield form.format(*head)
  for row in report['kernels']:
    cycles = f'{row["cycles"]:,}' if row['cycles'] else 'none'
    yield form.format(
      row['chip'],
      row['shape'],
      row['operation'],
      cycles,
      f'{1e3 * row["bound_s"]:.3f}' if row['bound_s'] else '-',
      row['bound_by'] or '-',
      str(row['over_least'] or '-'),
      str(row['over_least_or_copies'] or '-'),
      str(row['over_xla'] or '-'),
      _mib(row['temporary_bytes']),
      _mib(row['xla_temporary_bytes']),
    )
  for step in report.get('step_temporaries', ()):
    figures = ', '.join(
      f'{name} {_mib(nbytes)} MiB'
      for name, nbytes in step['temporary_bytes'].items()
    )
    yield (
      f'{step["chip"]} step of {step["batch"]:,} tokens, '
      f'{step["n_latents"]:,} latents, temporary HBM: {figures}'
    )
  for crossing in report.get('crossings', ()):
    ratio = crossing['from_ratio']
    yield f'{crossing["chip"]}: kernels ' + (
      f'are faster than dense codes from N / K {ratio:,.0f}'
      if ratio
      else 'have no estimate to compare with dense codes'
    )
  for step in report['steps']:
    where = f'{step["chip"]} {step["shape"]}'
    if step['step_s'] is None:
      yield f'{where}: not added up, some parts have no estimate'
      continue
    yield (
      f'{where}: all parts {1e3 * step["step_s"]:.3f} ms, '
      f"{step['over_product']} of the encoder's product"
      + ('' if step['sort_counted'] else ', the sort not counted')
    )


def main(argv: list[str]) -> None:
  """Entry point."""
  del argv
  values = flags.FLAGS
  chips = list(CHIPS) if values.chip == ['all'] else values.chip
  names = values.shape
  shapes = [s for s in SHAPES if names == ['all'] or s.name in names]

  def log(job, estimate, seconds):
    print(
      f'{job.chip} {job.program} {dict(job.arguments)}: '
      f'{estimate.error or f"{estimate.of():,} cycles"}, '
      f'{estimate.temporary / 2**20:,.1f} MiB, {seconds:.0f} s',
      file=sys.stderr,
      flush=True,
    )

  report = measure(chips, shapes, values.workers, log)
  report['step_temporaries'] = [step_temporaries(chip) for chip in chips]
  if {shape.name for shape in shapes} >= set(_CROSSING):
    report['crossings'] = [crossover(chip, report['kernels']) for chip in chips]
  for line in lines(report):
    print(line)
  if values.json:
    epath.Path(values.json).write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
  flags.DEFINE_list('chip', ['all'], 'chips, such as v6e, or all')
  flags.DEFINE_list('shape', ['all'], 'shapes of ops/shapes.py, or all')
  flags.DEFINE_integer('workers', 2, 'number of compilers that run at a time')
  flags.DEFINE_string('json', '', 'file for the table as JSON; empty for none')
  app.run(main)
