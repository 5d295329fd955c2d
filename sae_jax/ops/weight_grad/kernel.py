"""Weight gradients on a TPU's TensorCore: sums over pairs sorted by latent.

The rows of a chunk of pairs come by DMA, see `row_copies`, and are multiplied
by a [latents, pairs] matrix with one weight in each column. A step of the
grid is an item: a chunk of pairs and a block of latents that has some of
them, as in megablox (Gale et al. 2023, arXiv:2211.15841). Items are ordered by
both, so that a chunk is copied once and a block of the result written once.
"""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from sae_jax import errors
from sae_jax.ops import row_copies, varying
from sae_jax.ops.chip import LANES
from sae_jax.ops.row_copies import multiply
from sae_jax.ops.weight_grad import tiles


def segment_sums(
  latent_P: jax.Array,
  row_P: jax.Array,
  weights: Sequence[jax.Array],
  tables: Sequence[jax.Array],
  n_latents: int,
  count: jax.Array,
  *,
  dtype: jnp.dtype | None = None,
  expected: int | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[list[jax.Array], list[jax.Array]]:
  """Weighted sums of the rows of each latent's pairs, for one or two tables.

  Row n of a result is the sum of weights[p] table[row[p]] over the pairs p
  with latent[p] = n. With the codes and the output's cotangent that is the
  decoder's gradient, with the values' cotangent and the input the encoder's.
  The time depends on `count` and N, and hardly on P. A weight that is not a
  number spoils its own latent alone; a row that is not finite spoils
  neighbouring latents too.

  Args:
    latent_P: the latent of each pair, int32, ascending; N or more where a
      pair is not real.
    row_P: its row in the tables.
    weights: [P] for each table, float32.
    tables: one or two, [B, D]. D is a multiple of 128.
    n_latents: N.
    count: number of real pairs, int32. They come first; of the others only
      `latent_P` is read.
    dtype: bfloat16 to round the products' factors to it; None multiplies in
      full float32. Sums are float32.
    expected: number of pairs that are expected to be real, P if None. The
      sizes of blocks depend on it, and whether two tables are packed into one.
    interpret: as in `pallas_call`.

  Returns:
    The sums of each table, [N, D], zero for latents without pairs, and the
    sums of its weights, [N], all float32.

  Raises:
    UserError: if the kernel does not take a shape or a type.
  """
  n_tokens, d_model = tables[0].shape
  _check(weights, tables)
  n_pairs = latent_P.shape[0]
  expected = n_pairs if expected is None else expected
  rounds = dtype == jnp.bfloat16 and len(tables) == 2
  if rounds and tiles.packs(expected, n_tokens):
    tables = [_packed(*tables)]
  else:
    tables = [table.astype(jnp.float32) for table in tables]
  layout = tiles.choose(
    n_pairs, expected, n_latents, d_model, len(weights), len(tables)
  )

  def in_chunks(values_P, fill=0):
    short = -n_pairs % layout.pairs
    values_P = jnp.pad(values_P, (0, short), constant_values=fill)
    # A row of lanes per chunk; [chunks, pairs] would be padded to 8 rows.
    return values_P.reshape(-1, 1, layout.pairs)

  latents = in_chunks(latent_P, n_latents)
  *grads, totals = _run(
    layout,
    dtype,
    expected,
    interpret,
    n_latents,
    _items(layout, latents[:, 0], count, n_latents),
    in_chunks(row_P),
    latents,
    [in_chunks(weights_P) for weights_P in weights],
    tables,
  )
  totals = totals.swapaxes(0, 1).reshape(len(weights), -1)
  return grads, list(totals[:, :n_latents])


def _check(weights, tables):
  if len(tables) not in (1, 2) or len(weights) != len(tables):
    raise errors.UserError(
      f'{len(weights)} weights and {len(tables)} tables were given: '
      'use one or two of each'
    )
  d_model = tables[0].shape[1]
  if d_model % LANES:
    raise errors.UserError(
      f'd_model {d_model} must be a multiple of {LANES} for this kernel: '
      f'use {pl.cdiv(d_model, LANES) * LANES}'
    )


def _packed(low, high):
  """Both tables as bfloat16 in one 32-bit word, so that one copy serves."""
  low, high = (
    jax.lax.bitcast_convert_type(a.astype(jnp.bfloat16), jnp.uint16)
    for a in (low, high)
  )
  return low.astype(jnp.uint32) | (high.astype(jnp.uint32) << 16)


def _unpacked(words):
  # The high half of a float32 is a bfloat16.
  halves = words << 16, words & jnp.uint32(0xFFFF0000)
  return [jax.lax.bitcast_convert_type(half, jnp.float32) for half in halves]


class Items(NamedTuple):
  """What the steps of the grid do, in SMEM.

  Attributes:
    count: [1], how many pairs are real.
    bounds: the items of core c are those from bounds[c] to bounds[c + 1].
    chunk_I: the chunk of pairs of each item.
    block_I: its block of latents.
    latent_Q: the first latent of every part of the pairs, and one after all.
  """

  count: Any
  bounds: Any
  chunk_I: Any
  block_I: Any
  latent_Q: Any


def _items(layout, latent_CP, count, n_latents):
  """Every real chunk with the blocks it has pairs of, and the empty blocks.

  An item is one block further than the one before, unless a chunk begins in
  the block where the one before it ended ("shared"): then it is the same
  block. So a chunk's first item is its first block's number plus how many
  chunks up to it share one, and there are N blocks plus shared ones in all.
  """
  count = jnp.asarray(count, jnp.int32)
  n_chunks = latent_CP.shape[0]
  n_blocks = pl.cdiv(n_latents, layout.latents)
  n_items = n_blocks + n_chunks - 1
  number_C = jnp.arange(n_chunks, dtype=jnp.int32)
  first_C = latent_CP[:, 0] // layout.latents
  before_C = jnp.roll(latent_CP[:, -1] // layout.latents, 1).at[0].set(-1)
  real_C = number_C * layout.pairs < count
  shared_C = real_C & (first_C == before_C)
  item_C = first_C + jnp.cumsum(shared_C, dtype=jnp.int32)
  # The first chunk takes the blocks before its own, the last real one those
  # after: chunks that are not real have no item.
  item_C = jnp.where(real_C, item_C, n_items + number_C).at[0].set(0)
  begun_I = jnp.zeros(n_items, jnp.int32)
  begun_I = begun_I.at[item_C].set(
    1 + shared_C, mode='drop', unique_indices=True, indices_are_sorted=True
  )
  chunk_I = jnp.cumsum(begun_I > 0, dtype=jnp.int32) - 1
  stays_I = jnp.cumsum(begun_I > 1, dtype=jnp.int32)
  block_I = jnp.arange(n_items, dtype=jnp.int32) - stays_I
  total = n_blocks + shared_C.sum(dtype=jnp.int32)
  bounds = [jnp.zeros_like(total), total]
  if layout.cores == 2:
    # Half of the items, rounded to whole blocks, at least one for each core:
    # a block has one writer.
    middle = jnp.clip(block_I[total // 2], 1, n_blocks - 1)
    bounds.insert(1, (block_I < middle).sum(dtype=jnp.int32))
  latent_Q = jnp.append(latent_CP.reshape(-1)[:: row_copies.PART], n_latents)
  return Items(count[None], jnp.stack(bounds), chunk_I, block_I, latent_Q)


def _place(items, core, step):
  """The item of a core's step, or the nearest and False if it has none."""
  start, stop = items.bounds[core], items.bounds[core + 1]
  item = start + step - 1
  return jnp.clip(item, start, stop - 1), (step > 0) & (item < stop)


def _cost(layout, expected, n_latents, d_model, results, copied, n_pairs):
  """Declared cost: rows copied, gradients, a product per part and block."""
  blocks = pl.cdiv(n_latents, layout.latents)
  products = pl.cdiv(expected, row_copies.PART) + blocks
  return pl.CostEstimate(
    flops=2 * results * products * layout.latents * row_copies.PART * d_model,
    bytes_accessed=4 * d_model * (copied * expected + results * n_latents)
    + 4 * (2 + results) * n_pairs,
    transcendentals=0,
  )


# Traced once for all calls of one shape; see `decode.kernel`.
@functools.partial(
  jax.jit,
  static_argnames=('layout', 'dtype', 'expected', 'interpret', 'n_latents'),
)
def _run(
  layout,
  dtype,
  expected,
  interpret,
  n_latents,
  items,
  rows,
  latents,
  weights,
  tables,
):
  arrays = *items, rows, latents, *weights, *tables
  arrays = [varying.match(a, *arrays) for a in arrays]
  tables = [row_copies.in_hbm(t, interpret) for t in arrays[-len(tables) :]]
  n_chunks = latents.shape[0]
  n_blocks = pl.cdiv(n_latents, layout.latents)
  d_model = tables[0].shape[1]
  # A core's first step has nothing to sum: it copies the first chunk.
  steps = (items.bounds[1:] - items.bounds[:-1]).max() + 1
  if interpret and varying.axes(steps):
    # The interpreter of jax 0.10 wants a grid that is the same everywhere:
    # steps past a core's last item do nothing.
    steps = n_blocks + n_chunks

  def copied(core, step, *items):
    items = Items(*items)
    item, _ = _place(items, core, step)
    chunk = items.chunk_I[item] + (step > 0)
    return jnp.minimum(chunk, n_chunks - 1), 0, 0

  def summed(core, step, *items):
    items = Items(*items)
    return items.chunk_I[_place(items, core, step)[0]], 0, 0

  def written(core, step, *items):
    items = Items(*items)
    return items.block_I[_place(items, core, step)[0]]

  lanes = pl.BlockSpec((1, 1, layout.pairs), summed)
  in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
  grad = pl.BlockSpec((layout.latents, d_model), lambda *a: (written(*a), 0))
  results = len(weights)
  total = pl.BlockSpec(
    (1, results, layout.latents), lambda *a: (written(*a), 0, 0)
  )
  return pl.pallas_call(
    functools.partial(
      _kernel, layout, dtype, not interpret, results, len(tables)
    ),
    out_shape=[
      *[varying.shape((n_latents, d_model), jnp.float32, *arrays)] * results,
      varying.shape((n_blocks, results, layout.latents), jnp.float32, *arrays),
    ],
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(items),
      grid=(layout.cores, steps),
      in_specs=[
        pl.BlockSpec((1, 1, layout.pairs), copied, memory_space=pltpu.SMEM),
        *[lanes] * (1 + results),
        *[in_hbm] * len(tables),
      ],
      out_specs=[*[grad] * results, total],
      scratch_shapes=[
        pltpu.VMEM((results, layout.latents, row_copies.PART), jnp.float32),
        *row_copies.scratch(layout.pairs, tables),
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'),
      disable_bounds_checks=True,
      vmem_limit_bytes=layout.vmem_bytes,
    ),
    cost_estimate=_cost(
      layout,
      expected,
      n_latents,
      d_model,
      results,
      len(tables),
      latents.size,
    ),
    interpret=interpret,
    name='segment_sums',
  )(*arrays[: -len(tables)], *tables)


def _kernel(layout, dtype, unroll, results, copied, *refs):
  take = iter(refs).__next__
  items = Items(*(take() for _ in Items._fields))
  rows_ref, latents_ref = take(), take()
  weights_refs = [take() for _ in range(results)]
  table_refs = [take() for _ in range(copied)]
  grad_refs = [take() for _ in range(results)]
  totals_ref, partial_ref = take(), take()
  buffers = row_copies.pair(refs[-2 * copied - 1 :])

  core, step = pl.program_id(0), pl.program_id(1)
  start, stop = items.bounds[core], items.bounds[core + 1]
  item, active = _place(items, core, step)
  # At a core's first step no chunk has arrived yet: it is number -1 then.
  chunk = items.chunk_I[item] - (step == 0)
  block = items.block_I[item]

  def changes(values_I, other):
    inside = jnp.clip(other, start, stop - 1)
    return active & ((inside != other) | (values_I[inside] != values_I[item]))

  chunk_opens = changes(items.chunk_I, item - 1)

  @pl.when(changes(items.block_I, item - 1))
  def _():
    for ref in (*grad_refs, partial_ref):
      ref[...] = jnp.zeros_like(ref)

  def reduce(part, rows, n_real):
    lanes = row_copies.lanes(part)
    latent_1R = latents_ref[0, :, lanes] - block * layout.latents
    if n_real is not None:
      lane_1R = jax.lax.broadcasted_iota(jnp.int32, latent_1R.shape, 1)
      latent_1R = jnp.where(lane_1R < n_real, latent_1R, -1)
    shape = layout.latents, row_copies.PART
    hits_LR = jax.lax.broadcasted_iota(jnp.int32, shape, 0) == latent_1R
    rows = rows if copied == results else _unpacked(rows[0])
    for i, (rows_RD, weights_ref, grad_ref) in enumerate(
      zip(rows, weights_refs, grad_refs)
    ):
      # Selected, not multiplied: 0 times NaN would spread to other latents.
      weights_LR = jnp.where(hits_LR, weights_ref[0, :, lanes], 0.0)
      grad_ref[...] += multiply(weights_LR, rows_RD, ((1,), (0,)), dtype)
      partial_ref[i] += weights_LR

  copies = ((step == 0) | chunk_opens) & (chunk < items.chunk_I[stop - 1])
  row_copies.overlap(
    buffers,
    chunk + 1,
    table_refs,
    rows_ref,
    _count(items, layout, chunk + 1, copies),
    _count(items, layout, chunk, active),
    reduce,
    waits=chunk_opens,
    span=_span(items, layout, chunk, block),
    unroll=unroll,
  )

  @pl.when(changes(items.block_I, item + 1))
  def _():
    # By a product, whose sums over lanes come out along lanes.
    ones = jnp.ones((8, row_copies.PART), jnp.float32)
    for i in range(results):
      sums_8L = multiply(ones, partial_ref[i], ((1,), (1,)), None)
      totals_ref[0, i : i + 1] = sums_8L[:1]


def _count(items, layout, chunk, counts):
  real = jnp.clip(items.count[0] - chunk * layout.pairs, 0, layout.pairs)
  return jnp.where(counts, real, 0)


def _span(items, layout, chunk, block):
  """The parts of the chunk that have pairs of the block, all in between."""
  parts = layout.pairs // row_copies.PART
  begin, end = block * layout.latents, (block + 1) * layout.latents
  part = jnp.maximum(chunk, 0) * parts
  latents = [items.latent_Q[part + p] for p in range(parts + 1)]
  first = sum((latent < begin).astype(jnp.int32) for latent in latents[1:])
  stop = sum((latent < end).astype(jnp.int32) for latent in latents[:-1])
  return first, stop
