"""Costs of the kernels at real shapes, added up from those of `probes`.

The bound of a kernel is the longer of the compiler's cycles at the chip's clock
and of the bytes that it moves at the bandwidth of HBM. Nothing is measured.
"""

from collections.abc import Callable, Iterator
import dataclasses

from experiments.kernels.estimate import Estimate, Job, job
from sae_jax.ops.chip import LANES
from sae_jax.ops.encode_topk import exact
from sae_jax.ops.shapes import Shape
from sae_jax.tpu.chips import CHIPS

# Tokens at which XLA's own programs are estimated; the rest is scaled.
_TOKENS = 512
_MATMUL_TOKENS = 2048
# Most pairs at which XLA's sort is estimated; a larger sort is left out.
_MOST_SORTED = 2**18
# Most latents at which a pass over tokens that failed is estimated; with more
# latents it is scaled.
_AGAIN_LATENTS = 2**17

_Results = dict[Job, Estimate]


@dataclasses.dataclass(frozen=True)
class Cost:
  """Cost of one way to do one operation of a training step.

  Attributes:
    cycles: by the compiler's estimate, None where it gives none.
    hbm_bytes: bytes of HBM read and written.
    reason: why there are no cycles.
  """

  cycles: float | None
  hbm_bytes: float
  reason: str = ''

  def seconds(self, chip: str) -> float | None:
    """The bound, None where there is no estimate."""
    if self.cycles is None:
      return None
    moved = self.hbm_bytes / CHIPS[chip].hbm_bandwidth
    return max(self.cycles / (1e9 * CHIPS[chip].clock_ghz), moved)


@dataclasses.dataclass(frozen=True)
class Operation:
  """An operation of a training step at a shape.

  Attributes:
    name: the operation's name.
    jobs: compilations whose results the costs need.
    kernel: its cost with our kernel.
    xla: its cost as XLA does it.
    flops: of the products that every way must do.
    least_bytes: bytes of HBM that every way must move.
    whole: compilations at the shape itself, with our kernel and as XLA does
      it, for the temporary HBM of each.
    copies: cycles to issue the copies of single rows that every way must make;
      None if there are none.
  """

  name: str
  jobs: tuple[Job, ...]
  kernel: Callable[[_Results], Cost]
  xla: Callable[[_Results], Cost]
  flops: float
  least_bytes: float
  whole: tuple[Job, Job]
  copies: Callable[[_Results], Cost] | None = None


def _more(results: _Results, few: Job, many: Job, name: str = '') -> float:
  """The extra cycles of the larger of two sizes."""
  return results[many].of(name) - results[few].of(name)


def _failed(results: _Results, jobs) -> str:
  return next((results[job].error for job in jobs if results[job].error), '')


def _cost(jobs, cycles, hbm_bytes):
  """A cost of `cycles(results)` cycles, if all jobs succeeded."""

  def cost(results: _Results) -> Cost:
    reason = _failed(results, jobs)
    if reason:
      return Cost(None, 0, reason)
    moved = hbm_bytes(results) if callable(hbm_bytes) else hbm_bytes
    return Cost(cycles(results), moved)

  return cost


def operations(chip: str, shape: Shape) -> Iterator[Operation]:
  """All operations of a training step without AuxK, at a shape."""
  yield _encode(chip, shape)
  for name in ('gather_sum', 'sampled_products'):
    yield _gather(chip, shape, name)
  yield _segment_sums(chip, shape)
  yield _adam_rows(chip, shape)


def _pair(chip, name, kernel, xla, other=''):
  """Compilations at a whole shape with our kernel, and as XLA does it."""
  return (
    job(chip, name, estimated=False, **kernel),
    job(chip, other or name, estimated=False, **xla),
  )


def _encode(chip, shape):
  b, d, n, k = shape.batch, shape.d_model, shape.n_latents, shape.k
  given = {'batch': b, 'd': d, 'n': n, 'k': k}
  few, many = (job(chip, 'encode_bodies', blocks=i, **given) for i in (2, 4))
  # A network's unit is a power of two of at least k, where bins are many.
  unit = 1 << (k - 1).bit_length()
  unit_1, unit_2 = (
    job(chip, 'select_units', k=k, unit=unit, units=i) for i in (1, 2)
  )
  again = job(chip, 'encode_again', d=d, n=min(n, _AGAIN_LATENTS), k=k)

  def pass_cycles(results):
    """A pass over tokens that failed; without an estimate, its product."""
    if results[again].error:
      product = 2 * exact.REDO_TOKENS * n * d / CHIPS[chip].flops
      return product * 1e9 * CHIPS[chip].clock_ghz
    return results[again].of() * max(1, n / _AGAIN_LATENTS)

  def cycles(results):
    sizes = results[few].sizes
    body = _more(results, few, many, 'encode_topk') / 2
    body *= sizes['bodies'] / sizes['bodies_of_block']
    fold = _more(results, unit_1, unit_2, 'select')
    select = results[unit_1].of('select') + (sizes['select_units'] - 1) * fold
    each = -(-n // sizes['rows']) * body + select * sizes['tokens'] / LANES
    each *= -(-b // (sizes['tokens'] * sizes['cores']))
    return each + sizes['passes'] * pass_cycles(results)

  def moved(results):
    sizes = results[few].sizes
    reads = -(-b // sizes['tokens']) + sizes['passes']
    return 2 * reads * n * d + 2 * b * d + 8 * k * b

  jobs = few, many, unit_1, unit_2
  tokens = min(b, _MATMUL_TOKENS)
  half, whole = (
    job(chip, 'xla_matmul', batch=tokens, d=d, n=i) for i in (8192, 16_384)
  )
  return Operation(
    'encode_topk',
    (*jobs, again, half, whole),
    _cost(jobs, cycles, moved),
    _cost(
      (half, whole),
      lambda results: _more(results, half, whole) * n / 8192 * b / tokens,
      2 * n * d + 2 * b * d + 4 * b * n,
    ),
    2 * b * n * d,
    2 * n * d + 2 * b * d + 8 * k * b,
    _pair(chip, 'encode_whole', given | {'kernel': 1}, given | {'kernel': 0}),
  )


def _gather(chip, shape, name):
  b, d, n, k = shape.batch, shape.d_model, shape.n_latents, shape.k
  given = {'batch': b, 'd': d, 'n': n, 'k': k}
  ours = given | {'kind': name, 'active': shape.active}
  few, many = (job(chip, 'gather', blocks=i, **ours) for i in (4, 8))
  real = b * k * shape.active

  def cycles(results):
    blocks = -(-b // results[few].sizes['tokens'])
    return _more(results, few, many, name) / 4 * blocks

  copies, copies_of = _row_copies(chip, shape)
  rows = 4 * d * (real + b)
  single, double = (
    job(chip, f'xla_{name}', batch=i, d=d, n=n, k=k)
    for i in (_TOKENS, 2 * _TOKENS)
  )
  return Operation(
    name,
    (few, many, single, double, *copies),
    _cost((few, many), cycles, rows + 12 * b * k),
    _cost(
      (single, double),
      lambda results: _more(results, single, double) / _TOKENS * b,
      # Rows are read, written side by side and read again.
      4 * d * (3 * b * k + b),
    ),
    0,
    rows + 8 * real,
    _pair(chip, 'gather', ours | {'blocks': 0}, given, f'xla_{name}'),
    copies_of,
  )


def _row_copies(chip, shape):
  """Jobs, and the cost, of issuing a copy for each pair and nothing else."""
  b = shape.batch
  given = {'batch': b, 'd': shape.d_model, 'n': shape.n_latents, 'k': shape.k}
  jobs = few, many = [
    job(
      chip,
      'gather',
      kind='row_copies',
      blocks=blocks,
      active=shape.active,
      **given,
    )
    for blocks in (4, 8)
  ]

  def cycles(results):
    blocks = -(-b // results[few].sizes['tokens'])
    return _more(results, few, many, 'gather_sum') / 4 * blocks

  return jobs, _cost(jobs, cycles, 0)


def _segment_sums(chip, shape):
  b, d, n, k = shape.batch, shape.d_model, shape.n_latents, shape.k
  given = {'batch': b, 'd': d, 'n': n, 'k': k}
  ours = given | {'active': shape.active}
  few, many = (job(chip, 'segment_sums', chunks=i, **ours) for i in (8, 16))
  real = b * k * shape.active

  def cycles(results):
    estimate = results[few]
    packing = estimate.of() - estimate.of('segment_sums')
    each = _more(results, few, many, 'segment_sums') / 8
    return estimate.sizes['chunks'] * each + packing

  def moved(results):
    packed = results[few].sizes['packed']
    tables = 12 * b * d if packed else 0
    return 4 * d * ((1 if packed else 2) * real + 2 * n) + 16 * b * k + tables

  single, double = (
    job(chip, 'xla_segment_sums', batch=i, d=d, n=n, k=k)
    for i in (_TOKENS // 2, _TOKENS)
  )
  copies, copies_of = _row_copies(chip, shape)
  return Operation(
    'segment_sums',
    (few, many, single, double, *copies),
    _cost((few, many), cycles, moved),
    _cost(
      (single, double),
      lambda results: _more(results, single, double) / (_TOKENS // 2) * b,
      # Products are written and read, sums are read and written, zeros filled.
      2 * 4 * d * (4 * b * k + n),
    ),
    0,
    4 * d * (real + 2 * n) + 12 * real,
    _pair(
      chip, 'segment_sums', ours | {'chunks': 0}, given, 'xla_segment_sums'
    ),
    # At least one per pair: one copy may bring the rows of both tables.
    copies_of,
  )


def _adam_rows(chip, shape):
  d, n = shape.d_model, shape.n_latents
  kernel = [job(chip, 'adam_rows', d=d, n=i) for i in (4096, 8192)]
  xla = [job(chip, 'xla_adam_rows', d=d, n=i) for i in (4096, 8192)]
  return Operation(
    'adam_rows',
    (*kernel, *xla),
    _cost(
      kernel,
      lambda results: _more(results, *kernel, 'adam_rows') / 4096 * n,
      36 * n * d,
    ),
    _cost(xla, lambda results: _more(results, *xla) / 4096 * n, 64 * n * d),
    0,
    36 * n * d,
    _pair(
      chip, 'adam_rows', {'d': d, 'n': n}, {'d': d, 'n': n}, 'xla_adam_rows'
    ),
  )


def sort_job(chip: str, shape: Shape) -> Job | None:
  """The sort of a shape's candidates, if it is not too large to estimate."""
  # About twice as many pairs as are real are sorted, see `pairs.slots`.
  if shape.batch * shape.k * min(1, 2 * shape.active) > _MOST_SORTED:
    return None
  return job(
    chip,
    'pair_sort',
    batch=shape.batch,
    d=shape.d_model,
    k=shape.k,
    active=shape.active,
  )


def rest_bytes(shape: Shape) -> float:
  """HBM traffic of a step beside that of the operations.

  The encoder is rounded to bfloat16 and updated by Adam, where XLA is as good
  as a kernel; activations are read, and errors written and read.
  """
  weights = shape.n_latents * shape.d_model
  return (6 + 36) * weights + 5 * 4 * shape.batch * shape.d_model
