"""Decoding on a TPU's TensorCore: rows come by DMA and are summed on the MXU.

A chunk of a block's slots is reduced at every step of the grid while the rows
of the next one are on their way, see `row_copies`. Tokens of a block share
one product: a [block_tokens, slots] matrix with one weight in each column,
times the rows.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from sae_jax import errors
from sae_jax.ops import row_copies, varying
from sae_jax.ops.chip import LANES, SUBLANES
from sae_jax.ops.decode import tiles


def gather_sum(
  rows_GR: jax.Array,
  token_GR: jax.Array,
  weights_GR: jax.Array,
  count_G: jax.Array,
  w_ND: jax.Array,
  *,
  block_tokens: int,
  dtype: jnp.dtype | None = None,
  expected: int | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """Weighted sums of rows of `w_ND`, a batch cut into G blocks of tokens.

  A block has R slots of (row, token, weight). The first `count_G` of them are
  real; the others are not read, may hold anything and cost next to nothing. A
  weight that is not a number spoils its own token alone; a row that is not
  finite spoils the tokens of its block.

  Args:
    rows_GR: the row of each slot.
    token_GR: its token within the block, below `block_tokens`.
    weights_GR: its weight, float32.
    count_G: how many slots of each block are real, at most R.
    w_ND: the table, float32; it stays in HBM and is not copied. D is a
      multiple of 128.
    block_tokens: tokens of a block, a multiple of 8; see
      `tiles.block_tokens`.
    dtype: bfloat16 to round the product's factors to it; None multiplies in
      full float32. Sums are float32.
    expected: number of slots that are expected to be real, all if None; the
      cost that the kernel declares to XLA follows from it.
    interpret: as in `pallas_call`.

  Returns:
    The sums, [G * block_tokens, D] float32: repeated rows add up.

  Raises:
    UserError: if the kernel does not take a shape or a type.
  """
  _check(w_ND, block_tokens)
  layout = tiles.choose(*rows_GR.shape, w_ND.shape[1], block_tokens)
  return _run(
    _sum_part,
    layout,
    dtype,
    rows_GR.size if expected is None else expected,
    interpret,
    _chunk_counts(layout, count_G),
    _slots(layout, rows_GR),
    _slots(layout, token_GR),
    _slots(layout, weights_GR),
    w_ND,
  )


def sampled_products(
  rows_GR: jax.Array,
  token_GR: jax.Array,
  count_G: jax.Array,
  g_BD: jax.Array,
  w_ND: jax.Array,
  *,
  block_tokens: int,
  dtype: jnp.dtype | None = None,
  expected: int | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """Products of a token's row of `g_BD` with the rows of its slots.

  It is the gradient of `gather_sum` for the weights where `g_BD` is that of
  its result; the slots are described there.

  Args:
    rows_GR: the row of each slot.
    token_GR: its token within the block.
    count_G: how many slots of each block are real.
    g_BD: a row per token, B = G * block_tokens.
    w_ND: the table, float32.
    block_tokens: tokens of a block.
    dtype: of the products' factors.
    expected: as in `gather_sum`.
    interpret: as in `pallas_call`.

  Returns:
    <g[token], w[row]> of the real slots and zero for the others, [G, R]
    float32.

  Raises:
    UserError: if the kernel does not take a shape or a type.
  """
  _check(w_ND, block_tokens)
  n_blocks, n_slots = rows_GR.shape
  layout = tiles.choose(n_blocks, n_slots, w_ND.shape[1], block_tokens)
  products = _run(
    _product_part,
    layout,
    dtype,
    rows_GR.size if expected is None else expected,
    interpret,
    _chunk_counts(layout, count_G),
    _slots(layout, rows_GR),
    _slots(layout, token_GR),
    g_BD,
    w_ND,
  )
  return products.reshape(n_blocks, -1)[:, :n_slots]


def _check(w_ND, block_tokens):
  d_model = w_ND.shape[1]
  if w_ND.dtype != jnp.float32:
    raise errors.UserError(f'rows of {w_ND.dtype} are not copied: use float32')
  if d_model % LANES:
    raise errors.UserError(
      f'd_model {d_model} must be a multiple of {LANES} for this kernel: '
      f'use {-(-d_model // LANES) * LANES}'
    )
  if block_tokens % SUBLANES:
    raise errors.UserError(
      f'block_tokens {block_tokens} must be a multiple of {SUBLANES}: '
      f'use {-(-block_tokens // SUBLANES) * SUBLANES}'
    )


def _slots(layout, slots_GR):
  """A row of lanes per chunk; [chunks, slots] would be padded to 8 rows."""
  short = layout.chunks * layout.slots - slots_GR.shape[1]
  return jnp.pad(slots_GR, ((0, 0), (0, short))).reshape(-1, 1, layout.slots)


def _chunk_counts(layout, count_G):
  before_Q = layout.slots * jnp.arange(layout.chunks, dtype=jnp.int32)
  return jnp.clip(count_G[:, None] - before_Q, 0, layout.slots).reshape(-1)


def _cost(layout, n_blocks, d_model, expected):
  """Rows that are copied, and products, of which each takes a whole part."""
  parts = pl.cdiv(expected, n_blocks * row_copies.PART)
  tokens = n_blocks * layout.block_tokens
  slots = n_blocks * layout.chunks * layout.slots
  return pl.CostEstimate(
    flops=2 * tokens * parts * row_copies.PART * d_model,
    bytes_accessed=4 * d_model * (expected + tokens) + 12 * slots,
    transcendentals=0,
  )


# Traced once for all calls of one shape, not anew at each: a step has many.
@functools.partial(
  jax.jit,
  static_argnames=('reduce_part', 'layout', 'dtype', 'expected', 'interpret'),
)
def _run(
  reduce_part,
  layout,
  dtype,
  expected,
  interpret,
  counts,
  rows,
  token,
  operand,
  w,
):
  arrays = counts, rows, token, operand, w
  *arrays, table = [varying.match(a, *arrays) for a in arrays]
  d_model = w.shape[1]
  n_chunks = token.shape[0]
  # A block has one writer.
  steps = pl.cdiv(n_chunks // layout.chunks, layout.cores) * layout.chunks

  def filled(core, step):
    chunk = core * steps + jnp.minimum(step, steps - 1)
    return jnp.minimum(chunk, n_chunks - 1)

  def reduced(core, step):
    chunk = core * steps + jnp.maximum(step - 1, 0)
    return jnp.minimum(chunk, n_chunks - 1)

  in_lanes = pl.BlockSpec(
    (1, 1, layout.slots), lambda core, step, _: (reduced(core, step), 0, 0)
  )
  per_token = pl.BlockSpec(
    (layout.block_tokens, d_model),
    lambda core, step, _: (reduced(core, step) // layout.chunks, 0),
  )
  sums = reduce_part is _sum_part
  shape = (
    (n_chunks // layout.chunks * layout.block_tokens, d_model)
    if sums
    else token.shape
  )
  return pl.pallas_call(
    functools.partial(
      _kernel, reduce_part, layout, n_chunks, steps, dtype, not interpret
    ),
    out_shape=varying.shape(shape, jnp.float32, *arrays),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      # A last step has nothing to copy, a first one nothing to reduce.
      grid=(layout.cores, steps + 1),
      in_specs=[
        pl.BlockSpec(
          (1, 1, layout.slots),
          lambda core, step, _: (filled(core, step), 0, 0),
          memory_space=pltpu.SMEM,
        ),
        in_lanes,
        in_lanes if sums else per_token,
        pl.BlockSpec(memory_space=pltpu.HBM),
      ],
      out_specs=per_token if sums else in_lanes,
      scratch_shapes=row_copies.scratch(layout.slots, [w]),
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'),
      disable_bounds_checks=True,
      vmem_limit_bytes=layout.vmem_bytes,
    ),
    cost_estimate=_cost(layout, n_chunks // layout.chunks, d_model, expected),
    interpret=interpret,
    name='gather_sum' if sums else 'sampled_products',
  )(*arrays, row_copies.in_hbm(table, interpret))


def _kernel(
  reduce_part,
  layout,
  n_chunks,
  steps,
  dtype,
  unroll,
  counts_ref,
  rows_ref,
  token_ref,
  operand_ref,
  w_ref,
  out_ref,
  *scratch,
):
  step = pl.program_id(1)
  new = pl.program_id(0) * steps + step
  old = new - 1
  copies = (step < steps) & (new < n_chunks)
  reduces = (step > 0) & (old < n_chunks)
  begins = (reduce_part is _product_part) | (old % layout.chunks == 0)

  @pl.when(reduces & begins)
  def _():
    out_ref[...] = jnp.zeros_like(out_ref)

  row_copies.overlap(
    row_copies.pair(scratch),
    step,
    [w_ref],
    rows_ref,
    _count(counts_ref, new, copies),
    _count(counts_ref, old, reduces),
    functools.partial(reduce_part, token_ref, operand_ref, out_ref, dtype),
    unroll=unroll,
  )


def _count(counts_ref, chunk, exists):
  return jnp.where(exists, counts_ref[jnp.where(exists, chunk, 0)], 0)


def _sum_part(token_ref, weights_ref, out_ref, dtype, part, rows, n_real):
  hits_TR = _hits(token_ref, part, n_real, out_ref.shape[0])
  weights_1R = weights_ref[0, :, row_copies.lanes(part)]
  # Selected, not multiplied: a weight that is no number stays in its row.
  weights_TR = jnp.where(hits_TR, weights_1R, 0.0)
  out_ref[...] += row_copies.multiply(weights_TR, rows[0], ((1,), (0,)), dtype)


def _product_part(token_ref, g_ref, out_ref, dtype, part, rows, n_real):
  hits_TR = _hits(token_ref, part, n_real, g_ref.shape[0])
  all_TR = row_copies.multiply(g_ref[...], rows[0], ((1,), (1,)), dtype)
  products_1R = jnp.where(hits_TR, all_TR, 0.0).sum(0, keepdims=True)
  out_ref[0, :, row_copies.lanes(part)] = products_1R


def _hits(token_ref, part, n_real, n_tokens):
  token_1R = token_ref[0, :, row_copies.lanes(part)]
  if n_real is not None:
    lane_1R = jax.lax.broadcasted_iota(jnp.int32, token_1R.shape, 1)
    token_1R = jnp.where(lane_1R < n_real, token_1R, -1)
  place_TR = jax.lax.broadcasted_iota(jnp.int32, (n_tokens, row_copies.PART), 0)
  return place_TR == token_1R
