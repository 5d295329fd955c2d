"""Pallas TensorCore kernel: the encoder's product with a running top-k.

Blocks of latents stream through VMEM; pre-activations never leave it. A latent
belongs to a bin, by its place in the block, and every bin keeps its `kept`
largest values of each token in order, while the largest value that any bin of
the token had to drop is remembered. Before that, latents of one bin and one
product may compete in groups of which only the largest is offered to the bin,
and what loses counts as dropped. After the last block the k largest kept
values are sorted out exactly. They are the exact top k if the k-th is above
everything that was dropped; the kernel returns the greatest dropped value so
that its caller can tell, and recompute the few tokens that fail.

Tokens lie on lanes and latents on sublanes, so that bins are updated without
moving data within a register. A product is small and its results go to the
bins by registers; many products stand in one basic block, where the compiler
lays the update of one beside the next product.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from sae_jax.ops import row_copies, sorting_network, varying
from sae_jax.ops.chip import LANES, SUBLANES
from sae_jax.ops.encode_topk.tiles import Tiles


# In the loops that are unrolled `lax` is used, of which the many operations are
# traced several times faster than those of `jax.numpy`.
def _insert(bins, value, first):
  """Puts a value into sorted bins, a list of (value, first latent) pairs.

  Strict comparisons keep the earlier, lower latent of equal values ahead.
  """
  after, dropped = [], value
  above = [lax.gt(value, kept) for kept, _ in bins]
  for level, (kept, where) in enumerate(bins):
    shifted = lax.select(above[level], first, where)
    if level:
      shifted = lax.select(above[level - 1], bins[level - 1][1], shifted)
    after.append((lax.max(kept, dropped), shifted))
    dropped = lax.min(kept, dropped)
  return after, dropped


def _compete(values, firsts, greatest):
  """The largest of a group, its latent, and the greatest that was dropped."""
  group = list(zip(values, firsts))
  while len(group) > 1:
    winners = []
    for (a, first_a), (b, first_b) in zip(group[::2], group[1::2]):
      greatest = lax.max(greatest, lax.min(a, b))
      first = lax.select(lax.gt(b, a), first_b, first_a)
      winners.append((lax.max(a, b), first))
    group = winners
  return *group[0], greatest


def _kernel(
  x_ref,
  w_ref,
  bias_ref,
  vals_ref,
  idx_ref,
  dropped_ref,
  bins_ref,
  where_ref,
  greatest_ref,
  *,
  tiles: Tiles,
  blocks: int,
  last: int,
  k: int,
  precision,
):
  block = pl.program_id(1)
  # Bins that one product is for.
  own_bins = tiles.rows // tiles.depth
  pieces = tiles.tokens // tiles.lanes
  candidates = tiles.kept * tiles.bins
  start = jnp.minimum(block * tiles.bins * tiles.depth, last)

  @pl.when(block == 0)
  def _():
    bins_ref[...] = jnp.full(bins_ref.shape, -jnp.inf, jnp.float32)
    where_ref[...] = jnp.zeros(where_ref.shape, jnp.int32)
    greatest_ref[...] = jnp.full(greatest_ref.shape, -jnp.inf, jnp.float32)

  def product(part, lanes):
    """Pre-activations of `tiles.rows` latents."""
    at = pl.ds(pl.multiple_of(part * tiles.rows, tiles.rows), tiles.rows)
    pre = jnp.dot(
      w_ref[at, :],
      x_ref[lanes],
      preferred_element_type=jnp.float32,
      precision=precision,
    )
    # The bias is a row in memory, where a column would be padded 128 times.
    row = jnp.broadcast_to(bias_ref[0, :, at], (LANES, tiles.rows))
    return pre + jnp.tile(row.T, (1, tiles.lanes // LANES))

  def update(at, lanes, values, first, greatest):
    """Eight bins take in their latents of one product."""
    levels = [
      pl.ds(level * tiles.bins + at, SUBLANES) for level in range(tiles.kept)
    ]
    bins = [
      (bins_ref[lanes, level], where_ref[lanes, level]) for level in levels
    ]
    firsts = [
      lax.broadcast(first + i * own_bins, values[0].shape)
      for i in range(tiles.depth)
    ]
    for i in range(0, tiles.depth, tiles.group):
      group = slice(i, i + tiles.group)
      value, latent, greatest = _compete(values[group], firsts[group], greatest)
      bins, dropped = _insert(bins, value, latent)
      greatest = lax.max(greatest, dropped)
    for level, (kept, where) in zip(levels, bins):
      bins_ref[lanes, level] = kept
      where_ref[lanes, level] = where
    return greatest

  def body(i, carry):
    lanes = i % pieces
    greatest = greatest_ref[lanes]
    for product_of_body in range(tiles.unrolled):
      part = i // pieces * tiles.unrolled + product_of_body
      pre = product(part, lanes)
      for eight in range(0, own_bins, SUBLANES):
        at = pl.multiple_of(part * own_bins + eight, SUBLANES)
        values = [
          lax.slice_in_dim(pre, row, row + SUBLANES)
          for row in range(eight, tiles.rows, own_bins)
        ]
        greatest = update(
          at, lanes, values, start + part * tiles.rows, greatest
        )
    greatest_ref[lanes] = greatest
    return carry

  bodies = tiles.bins // own_bins // tiles.unrolled
  lax.fori_loop(0, bodies * pieces, body, 0)

  @pl.when(block == blocks - 1)
  def _():
    def piece(p, carry):
      def number(group, carry):
        at = pl.ds(pl.multiple_of(group * SUBLANES, SUBLANES), SUBLANES)
        place = lax.broadcasted_iota(jnp.int32, (SUBLANES, tiles.lanes), 0)
        own = (group * SUBLANES + place) % own_bins
        where_ref[p, at, :] = where_ref[p, at, :] + own
        return carry

      lax.fori_loop(0, candidates // SUBLANES, number, 0)
      lanes = pl.ds(pl.multiple_of(p * tiles.lanes, tiles.lanes), tiles.lanes)
      dropped_ref[:, lanes] = greatest_ref[p].max(0, keepdims=True)
      outs = (r.at[:, lanes] for r in (vals_ref, idx_ref))
      sorting_network.top_k(
        bins_ref.at[p], where_ref.at[p], candidates, k, *outs
      )
      return carry

    lax.fori_loop(0, pieces, piece, 0)


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
    dtype: of the factors, see `ops.matmul`.
    interpret: as in `pallas_call`.

  Returns:
    vals_BK, descending, equal values by ascending index; idx_BK int32; and
    dropped_B, the greatest value of each token that was dropped. A token's
    result is exact if no pre-activation is NaN and vals[k-1] > dropped or
    dropped is minus infinity.
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
  x_DB = jnp.pad(x_BD.astype(factor), ((0, padded - batch), (0, 0)))
  x_DB = x_DB.reshape(-1, tiles.lanes, width).swapaxes(1, 2)
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
  steps = sorting_network.scratch_steps(tiles.kept * tiles.bins, k)
  pieces = tiles.tokens // tiles.lanes
  scratch = (pieces, steps * SUBLANES, tiles.lanes)

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
    grid=(padded // tiles.tokens, blocks),
    in_specs=[
      pl.BlockSpec((pieces, width, tiles.lanes), lambda i, j: (i, 0, 0)),
      pl.BlockSpec(
        (pl.Element(rows), pl.Element(width)),
        lambda i, j: (pl.multiple_of(jnp.minimum(j * rows, last), 16), 0),
      ),
      pl.BlockSpec((1, 1, rows), lambda i, j: (j, 0, 0)),
    ],
    out_specs=[
      pl.BlockSpec((n, tiles.tokens), lambda i, j: (0, i)) for n, _ in shapes
    ],
    scratch_shapes=[
      pltpu.VMEM(scratch, jnp.float32),
      pltpu.VMEM(scratch, jnp.int32),
      pltpu.VMEM((pieces, SUBLANES, tiles.lanes), jnp.float32),
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
