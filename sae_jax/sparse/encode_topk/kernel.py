"""Pallas TensorCore kernel: the encoder's product with a running top-k.

Blocks of latents stream through VMEM; pre-activations never leave it. Each
latent belongs to a bin, its place in the block mod `bins`, and every bin keeps
its `kept` largest values of each token in order, while the largest value that
any bin of the token had to drop is remembered. After the last block the k
largest kept values are sorted out exactly. They are the exact top k if the
k-th is above everything that was dropped; the kernel returns the greatest
dropped value so that its caller can tell, and recompute the few tokens that
fail.

Tokens lie on lanes and latents on sublanes, so that bins are updated without
moving data within a register.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from sae_jax.sparse import row_copies, varying
from sae_jax.sparse.encode_topk import select
from sae_jax.sparse.encode_topk.tiles import Tiles

_SUBLANES = 8
_LANES = 128


def _insert(bins, value, first):
  """Puts a value into sorted bins, a list of (value, first latent) pairs.

  Strict comparisons keep the earlier, lower latent of equal values ahead.
  """
  after, dropped = [], value
  above = [value > kept for kept, _ in bins]
  for level, (kept, where) in enumerate(bins):
    shifted = jnp.where(above[level], first, where)
    if level:
      shifted = jnp.where(above[level - 1], bins[level - 1][1], shifted)
    after.append((jnp.maximum(kept, dropped), shifted))
    dropped = jnp.minimum(kept, dropped)
  return after, dropped


def _kernel(
  x_ref,
  w_ref,
  bias_ref,
  vals_ref,
  idx_ref,
  dropped_ref,
  even_ref,
  odd_ref,
  bins_ref,
  where_ref,
  most_ref,
  *,
  tiles: Tiles,
  blocks: int,
  last: int,
  k: int,
  precision,
):
  block = pl.program_id(1)
  rows = tiles.bins * tiles.depth
  products = rows // tiles.rows
  # Groups of eight bins that are updated beside one product.
  groups = tiles.bins // _SUBLANES // products
  pieces = tiles.tokens // tiles.lanes
  candidates = tiles.kept * tiles.bins

  @pl.when(block == 0)
  def _():
    bins_ref[...] = jnp.full(bins_ref.shape, -jnp.inf, jnp.float32)
    where_ref[...] = jnp.zeros(where_ref.shape, jnp.int32)
    most_ref[...] = jnp.full(most_ref.shape, -jnp.inf, jnp.float32)

  def product(part, lanes, out_ref):
    """Pre-activations of `tiles.rows` latents of the block in VMEM."""
    at = pl.ds(pl.multiple_of(part * tiles.rows, tiles.rows), tiles.rows)
    pre = jnp.dot(
      w_ref[at, :],
      x_ref[:, lanes],
      preferred_element_type=jnp.float32,
      precision=precision,
    )
    # The bias is a row in memory, where a column would be padded 128 times.
    row = jnp.broadcast_to(bias_ref[0, :, at], (_LANES, tiles.rows))
    out_ref[at, lanes] = pre + jnp.tile(row.T, (1, tiles.lanes // _LANES))

  def update(group, lanes, in_ref, first):
    """Eight bins take in what a block, from the latent `first`, has."""
    at = pl.multiple_of(group * _SUBLANES, _SUBLANES)
    levels = [
      pl.ds(level * tiles.bins + at, _SUBLANES) for level in range(tiles.kept)
    ]
    bins = [
      (bins_ref[level, lanes], where_ref[level, lanes]) for level in levels
    ]
    most = most_ref[:, lanes]
    for part in range(tiles.depth):
      value = in_ref[pl.ds(part * tiles.bins + at, _SUBLANES), lanes]
      latent = jnp.full(value.shape, first + part * tiles.bins, jnp.int32)
      bins, dropped = _insert(bins, value, latent)
      most = jnp.maximum(most, dropped)
    for level, (kept, where) in zip(levels, bins):
      bins_ref[level, lanes] = kept
      where_ref[level, lanes] = where
    most_ref[:, lanes] = most

  def each(body):
    """Runs over products and pieces of the tokens, in one loop."""

    def step(i, carry):
      lanes = pl.multiple_of(i % pieces * tiles.lanes, tiles.lanes)
      body(i // pieces, pl.ds(lanes, tiles.lanes))
      return carry

    lax.fori_loop(0, products * pieces, step, 0)

  def updates(part, lanes, in_ref, first):
    for i in range(groups):
      update(part * groups + i, lanes, in_ref, first)

  # The product of one block runs beside the update of the one before. Two
  # buffers with fixed roles: one indexed by parity would not be seen to be
  # free of conflicts, and nothing would overlap.
  def both(new_ref, old_ref):
    def body(part, lanes):
      product(part, lanes, new_ref)
      updates(part, lanes, old_ref, (block - 1) * rows)

    each(body)

  inside = (block > 0) & (block < blocks)

  @pl.when(block == 0)
  def _():
    each(lambda part, lanes: product(part, lanes, even_ref))

  @pl.when(inside & (block % 2 == 1))
  def _():
    both(odd_ref, even_ref)

  @pl.when(inside & (block % 2 == 0))
  def _():
    both(even_ref, odd_ref)

  @pl.when(block == blocks)
  def _():
    last_ref = even_ref if blocks % 2 else odd_ref
    each(lambda part, lanes: updates(part, lanes, last_ref, last))

    def number(group, carry):
      at = pl.ds(pl.multiple_of(group * _SUBLANES, _SUBLANES), _SUBLANES)
      place = lax.broadcasted_iota(jnp.int32, (_SUBLANES, tiles.tokens), 0)
      own = (group * _SUBLANES + place) % tiles.bins
      where_ref[at, :] = where_ref[at, :] + own
      return carry

    lax.fori_loop(0, candidates // _SUBLANES, number, 0)
    dropped_ref[...] = most_ref[...].max(0, keepdims=True)
    select.top_k(bins_ref, where_ref, candidates, k, vals_ref, idx_ref)


@functools.partial(
  jax.jit, static_argnames=('k', 'tiles', 'dtype', 'interpret')
)
def encode_topk(
  x_BD: jax.Array,
  w_enc_ND: jax.Array,
  b_lat_N: jax.Array,
  k: int,
  *,
  tiles: Tiles,
  dtype: jnp.dtype | None = None,
  interpret=False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Top-k of x W_enc^T + b_lat, with a certificate of exactness.

  Args:
    x_BD: inputs, float32.
    w_enc_ND: a row per latent, float32.
    b_lat_N: latent bias; minus infinity leaves a latent out.
    k: how many are taken, at most tiles.kept * tiles.bins.
    tiles: sizes of blocks, from `tiles.choose`.
    dtype: of the factors, see `sparse.matmul`.
    interpret: as `pallas_call` has it.

  Returns:
    vals_BK, descending, equal values by ascending index, idx_BK int32, and
    dropped_B: a token's result is exact if vals[k-1] > dropped, or dropped is
    minus infinity, and its pre-activations are all numbers.
  """
  batch, width = x_BD.shape
  n_latents = w_enc_ND.shape[0]
  rows = tiles.bins * tiles.depth
  blocks = -(-n_latents // rows)
  # The last block ends with the last latent, and what it shares with the one
  # before is left out by its bias. Copies must start at whole tiles of rows.
  short = max(rows, -(-n_latents // 16) * 16) - n_latents
  last = n_latents + short - rows
  padded = -(-batch // tiles.tokens) * tiles.tokens
  factor = jnp.float32 if dtype is None else dtype
  x_DB = jnp.pad(x_BD.astype(factor), ((0, padded - batch), (0, 0))).T
  w_enc_ND = jnp.pad(w_enc_ND.astype(factor), ((0, short), (0, 0)))
  bias_N = jnp.pad(b_lat_N, (0, short), constant_values=-jnp.inf)
  before = (blocks - 1) * rows
  bias = jnp.concatenate(
    [
      bias_N[:before],
      jnp.full((before - last,), -jnp.inf, bias_N.dtype),
      bias_N[before:],
    ]
  )
  steps = select.scratch_steps(tiles.kept * tiles.bins, k)
  scratch = (steps * _SUBLANES, tiles.tokens)

  shapes = ((k, jnp.float32), (k, jnp.int32), (1, jnp.float32))
  vals, idx, dropped = pl.pallas_call(
    functools.partial(
      _kernel,
      tiles=tiles,
      blocks=blocks,
      last=last,
      k=k,
      precision=jax.lax.Precision.HIGHEST if dtype is None else None,
    ),
    out_shape=[
      varying.shape((n, padded), kind, x_BD, w_enc_ND, b_lat_N)
      for n, kind in shapes
    ],
    grid=(padded // tiles.tokens, blocks + 1),
    in_specs=[
      pl.BlockSpec((width, tiles.tokens), lambda i, j: (0, i)),
      pl.BlockSpec(
        (pl.Element(rows), pl.Element(width)),
        lambda i, j: (pl.multiple_of(jnp.minimum(j * rows, last), 16), 0),
      ),
      pl.BlockSpec(
        (1, 1, rows), lambda i, j: (jnp.minimum(j, blocks - 1), 0, 0)
      ),
    ],
    out_specs=[
      pl.BlockSpec((n, tiles.tokens), lambda i, j: (0, i)) for n, _ in shapes
    ],
    scratch_shapes=[
      pltpu.VMEM((rows, tiles.tokens), jnp.float32),
      pltpu.VMEM((rows, tiles.tokens), jnp.float32),
      pltpu.VMEM(scratch, jnp.float32),
      pltpu.VMEM(scratch, jnp.int32),
      pltpu.VMEM((_SUBLANES, tiles.tokens), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'),
      vmem_limit_bytes=tiles.vmem_bytes(width, k, factor),
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * padded * n_latents * width,
      bytes_accessed=padded // tiles.tokens * w_enc_ND.nbytes
      + x_DB.nbytes
      + 8 * k * padded,
      transcendentals=0,
    ),
    interpret=interpret,
    name='encode_topk',
  )(x_DB, row_copies.in_hbm(w_enc_ND, interpret), bias.reshape(blocks, 1, rows))
  return vals.T[:batch], idx.T[:batch], dropped[0, :batch]
