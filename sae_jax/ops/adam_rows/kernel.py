"""Pallas kernels: everything a row needs is done while it is in VMEM.

Rows are independent, so blocks of them may come in any order and on both cores
of a chip that has two: the pipeline of the grid is all that moves them.
"""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from sae_jax.ops.adam_rows import tiles
from sae_jax.ops.chip import LANES, SUBLANES

# Read and written by a step: p, mu, nu, ema; read only: g.
_IN, _OUT = 5, 4
_TILE = (SUBLANES, LANES)


def adam_rows(
  scalars: jax.Array,
  p_ND: jax.Array,
  mu_ND: jax.Array,
  nu_ND: jax.Array,
  ema_ND: jax.Array,
  g_ND: jax.Array,
  *,
  guarded: bool,
  b1: float,
  b2: float,
  eps: float,
  ema_decay: float,
  project: bool = True,
  tile: tiles.Tile | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, ...]:
  """The step of `api.adam_rows`; the first four matrices are overwritten.

  Args:
    scalars: float32 [5]: learning rate, the factors that correct the bias of
      both moments, the gradient's scale, and whether the step is taken.
    p_ND: parameters.
    mu_ND: first moments.
    nu_ND: second moments.
    ema_ND: moving average.
    g_ND: gradients.
    guarded: whether the last scalar is read; if not, the step is taken.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: Adam's epsilon.
    ema_decay: decay of the average.
    project: whether the gradient's component along a row is taken away.
    tile: rows at a time; None to choose.
    interpret: as in `pallas_call`.

  Returns:
    The new p, mu, nu and ema and the gradient's squared norm.
  """
  n, width = p_ND.shape
  tile = tile or tiles.choose(n, width, _IN + _OUT)
  blocks = pl.cdiv(n, tile.block)

  def kernel(scalars_ref, *refs):
    rate, c1, c2, scale, taken = (scalars_ref[i] for i in range(5))
    old, g_ref, new = refs[:4], refs[4], refs[5:9]

    def group(rows, valid, sum_G1):
      p_GD, mu_GD, nu_GD, ema_GD = before = [ref[rows, :] for ref in old]
      g_GD = g_ref[rows, :]
      if project:
        g_GD = _project(g_GD, p_GD)
      sum_G1 += _squares(g_GD, valid)
      g_GD *= scale
      mu_GD = (1 - b1) * g_GD + b1 * mu_GD
      nu_GD = (1 - b2) * (g_GD * g_GD) + b2 * nu_GD
      p_GD -= rate * (c1 * mu_GD / (jnp.sqrt(c2 * nu_GD) + eps))
      norm_G1 = jnp.sqrt((p_GD * p_GD).sum(-1, keepdims=True))
      # One division a row; its numbers are multiplied.
      p_GD *= 1 / jnp.where(norm_G1 > 0, norm_G1, 1)
      ema_GD = (1 - ema_decay) * p_GD + ema_decay * ema_GD
      after = [p_GD, mu_GD, nu_GD, ema_GD]
      for ref, a, b in zip(new, after, before):
        ref[rows, :] = jnp.where(taken > 0, a, b) if guarded else a
      return sum_G1

    _over_groups(n, tile, group, refs[9])

  block = pl.BlockSpec((tile.block, width), lambda i: (i, 0))
  # Operations per element: projection 4, both norms 4, scale 1, moments 7, step
  # 6, average 3, unit norm 1.
  *new, partial = pl.pallas_call(
    kernel,
    grid=(blocks,),
    in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *[block] * _IN],
    out_specs=[*[block] * _OUT, _partial_block()],
    out_shape=[
      *[jax.ShapeDtypeStruct(p_ND.shape, p_ND.dtype)] * _OUT,
      _partial_shape(blocks),
    ],
    input_output_aliases={1 + i: i for i in range(_OUT)},
    compiler_params=_params(tile),
    cost_estimate=pl.CostEstimate(
      flops=26 * p_ND.size,
      transcendentals=2 * p_ND.size,
      bytes_accessed=(_IN + _OUT) * p_ND.nbytes,
    ),
    interpret=interpret,
    name='adam_rows',
  )(scalars, p_ND, mu_ND, nu_ND, ema_ND, g_ND)
  return *new, _total(partial)


def squared_norm(
  p_ND: jax.Array,
  g_ND: jax.Array,
  *,
  project: bool = True,
  tile: tiles.Tile | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """The squared norm of the gradient, projected along unit rows or not.

  Computed as the sum over (g - <g, p> p)^2, in one pass, since a row stays in
  VMEM for its second use. |g|^2 - <g, p>^2 (2 - |p|^2) would be one pass in XLA
  too, but cancels: if the projection leaves a thousandth of a row's gradient,
  a tenth of its float32 square is wrong.
  """
  n, width = p_ND.shape
  tile = tile or tiles.choose(n, width, 2)
  blocks = pl.cdiv(n, tile.block)

  def kernel(p_ref, g_ref, partial_ref):
    def group(rows, valid, sum_G1):
      g_GD = g_ref[rows, :]
      if project:
        g_GD = _project(g_GD, p_ref[rows, :])
      return sum_G1 + _squares(g_GD, valid)

    _over_groups(n, tile, group, partial_ref)

  block = pl.BlockSpec((tile.block, width), lambda i: (i, 0))
  partial = pl.pallas_call(
    kernel,
    grid=(blocks,),
    in_specs=[block, block],
    out_specs=_partial_block(),
    out_shape=_partial_shape(blocks),
    compiler_params=_params(tile),
    cost_estimate=pl.CostEstimate(
      flops=6 * p_ND.size, transcendentals=0, bytes_accessed=2 * p_ND.nbytes
    ),
    interpret=interpret,
    name='projected_squared_norm',
  )(p_ND, g_ND)
  return _total(partial)


def _project(g_GD, p_GD):
  return g_GD - (g_GD * p_GD).sum(-1, keepdims=True) * p_GD


def _squares(g_GD, valid_G1):
  """The squares' sum of each row, 0 past the last row: those hold anything."""
  return jnp.where(valid_G1, (g_GD * g_GD).sum(-1, keepdims=True), 0)


def _over_groups(n, tile, group, partial_ref):
  """Runs `group` over a block and stores the sum of its rows' squares."""
  first = pl.program_id(0) * tile.block
  lines_G1 = jax.lax.broadcasted_iota(jnp.int32, (tile.group, 1), 0)

  def body(i, sum_G1):
    start = pl.multiple_of(i * tile.group, tile.group)
    valid_G1 = first + start + lines_G1 < n
    return group(pl.ds(start, tile.group), valid_G1, sum_G1)

  sum_G1 = jax.lax.fori_loop(
    0,
    tile.block // tile.group,
    body,
    jnp.zeros((tile.group, 1), jnp.float32),
  )
  partial_ref[...] = jnp.broadcast_to(sum_G1.sum(), _TILE)


def _partial_block():
  # A block's own tile, so that no two cores add to one number.
  return pl.BlockSpec(_TILE, lambda i: (i, 0))


def _partial_shape(blocks):
  return jax.ShapeDtypeStruct((blocks * _TILE[0], _TILE[1]), jnp.float32)


def _total(partial):
  return partial[:: _TILE[0], 0].sum()


def _params(tile):
  return pltpu.CompilerParams(
    dimension_semantics=('parallel',), vmem_limit_bytes=tile.vmem_bytes
  )
