"""Pallas TensorCore kernel: exact top-k of rows by a sorting network.

XLA sorts rows for their top k, or has a library call for wide ones; either is
slow to run and takes up to a minute to compile. Tokens lie on lanes here, and
blocks of candidates stream by, each sorted together with the best so far.
"""

import functools

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from sae_jax.ops import sorting_network, varying
from sae_jax.ops.chip import LANES, SUBLANES

# Candidates of a step: with their indices and double buffers 8 MiB of VMEM.
_BLOCK = 4096
_INT_BITS = 0x7FFFFFFF


def _keys(x: jax.Array) -> jax.Array:
  """Integers that order as `lax.top_k` orders floats, NaN above all."""
  bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
  bits = jnp.where(jnp.isnan(x), _INT_BITS, bits)
  return jnp.where(bits < 0, bits ^ _INT_BITS, bits)


def _values(keys: jax.Array) -> jax.Array:
  bits = jnp.where(keys < 0, keys ^ _INT_BITS, keys)
  return lax.bitcast_convert_type(bits, jnp.float32)


def _kernel(keys_ref, best_ref, place_ref, vals_ref, idx_ref, *, k: int):
  block = pl.program_id(1)
  size = keys_ref.shape[0]
  n_best = best_ref.shape[0]
  vals_ref[:size] = keys_ref[...]
  place = lax.broadcasted_iota(jnp.int32, (size, LANES), 0)
  idx_ref[:size] = place + block * size

  @pl.when(block == 0)
  def _():
    limits = jnp.iinfo(jnp.int32)
    best_ref[...] = jnp.full(best_ref.shape, limits.min, jnp.int32)
    place_ref[...] = jnp.full(place_ref.shape, limits.max, jnp.int32)

  vals_ref[size : size + n_best] = best_ref[...]
  idx_ref[size : size + n_best] = place_ref[...]
  sorting_network.top_k(
    vals_ref, idx_ref, size + n_best, k, best_ref, place_ref
  )


@functools.partial(jax.jit, static_argnames=('k', 'block', 'interpret'))
def top_k(
  x_BN: jax.Array, k: int, *, block: int = _BLOCK, interpret=False
) -> tuple[jax.Array, jax.Array]:
  """The k largest entries of each row.

  Args:
    x_BN: values, float32.
    k: how many to take, at most N.
    block: candidates of a step, a multiple of 8.
    interpret: as in `pallas_call`.

  Returns:
    vals_BK, descending, NaN first, equal values by ascending index, and idx_BK
    int32.
  """
  batch, n = x_BN.shape
  block = min(block, -(-n // SUBLANES) * SUBLANES)
  n_best = -(-k // SUBLANES) * SUBLANES
  keys_NB = jnp.pad(
    _keys(x_BN).T,
    ((0, -n % block), (0, -batch % LANES)),
    constant_values=jnp.iinfo(jnp.int32).min,
  )
  padded_n, padded = keys_NB.shape
  scratch = (SUBLANES * sorting_network.scratch_steps(block + n_best, k), LANES)
  keys, idx = pl.pallas_call(
    functools.partial(_kernel, k=k),
    out_shape=[varying.shape((n_best, padded), jnp.int32, x_BN)] * 2,
    grid=(padded // LANES, padded_n // block),
    in_specs=[pl.BlockSpec((block, LANES), lambda i, j: (j, i))],
    out_specs=[pl.BlockSpec((n_best, LANES), lambda i, j: (0, i))] * 2,
    scratch_shapes=[pltpu.VMEM(scratch, jnp.int32)] * 2,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary')
    ),
    cost_estimate=pl.CostEstimate(
      flops=0,
      bytes_accessed=keys_NB.nbytes + 8 * n_best * padded,
      transcendentals=0,
    ),
    interpret=interpret,
    name='top_k',
  )(keys_NB)
  return _values(keys[:k, :batch].T), idx[:k, :batch].T
