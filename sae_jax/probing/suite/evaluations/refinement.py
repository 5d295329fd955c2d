"""Refinement: the magnitudes that would reconstruct best, and shrinkage."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sae_jax.probing.suite import arrays
from sae_jax.probing.suite import scored as scored_lib
from sae_jax.probing.suite.context import Context
from sae_jax.probing.suite.figures import divided, ratio, SHARE, Statistic
from sae_jax.probing.suite.outcome import Outcome

TITLE = 'Refinement and shrinkage'
ABOUT = """Which latents are active, and their directions, are held; their
magnitudes are fitted anew, to be at least 0 and to reconstruct the activation
best. If the encoder's own magnitudes are systematically smaller, the
autoencoder shrinks: it has been paid for small activations, as an L1 penalty
does. TopK has no such penalty.

Non-negative least squares for each test row, by coordinate descent until no
magnitude moves. Gao et al. (2024), section 5.1; Wright and Sharkey (2024)."""
UNIT = 'documents'


@dataclasses.dataclass(frozen=True)
class Size:
  """What is measured; rows of each draw."""

  rows: int
  batch_rows: int = 512


SIZES = {'quick': Size(1024), 'all': Size(20_000)}
# A sweep's greatest move, in units of the row's greatest magnitude, at which
# coordinate descent is done; and most sweeps.
_TOLERANCE = 1e-5
_SWEEPS = 2000

STATISTICS = {
  'shrinkage': Statistic(
    'shrinkage',
    'How much smaller the magnitudes of active latents are than those that '
    'reconstruct best: 1 less the ratio of their sums. 0 without shrinkage.',
    lambda sums: 1 - divided(sums['own'], sums['refined']),
  ),
  'gain': Statistic(
    'FVU gained',
    'Fraction of variance unexplained less that with refined magnitudes: what '
    "the encoder's magnitudes cost.",
    lambda sums: divided(sums['error'] - sums['error_refined'], sums['total']),
    better='low',
  ),
  'fvu_refined': Statistic(
    'FVU refined',
    'Fraction of variance unexplained with refined magnitudes: what the choice '
    'of latents and their directions allow.',
    ratio('error_refined', 'total'),
    better='low',
    orders=True,
  ),
  'dropped': Statistic(
    'dropped',
    'Share of the active latents whose refined magnitude is 0: the '
    'reconstruction is better without them.',
    ratio('dropped', 'active'),
    better='low',
    ends=SHARE,
  ),
}


def measure(context: Context) -> Outcome:
  size = SIZES[context.size]
  drawn = context.rows(size.rows)
  means = {name: context.mean(name) for name in context.scored}
  samples = context.sums_of_rows(
    drawn,
    size.batch_rows,
    lambda name, scored, raw_BD: _terms(*scored, raw_BD, means[name]),
    'refinement',
  )
  return Outcome(samples)


@functools.partial(jax.jit, static_argnums=0)
def _terms(shape, sae, raw_BD, mean_D):
  x_BD, left_BD = scored_lib.wanted(shape, sae, raw_BD)
  vals_BK, idx_BK = scored_lib.codes(shape, sae, raw_BD)
  rows_BKD = scored_lib.rows(shape, sae.w_dec_ND, idx_BK)
  new_BK = refined(rows_BKD, left_BD, vals_BK)

  def error(magnitudes_BK):
    out_BD = jnp.einsum('bk,bkd->bd', magnitudes_BK, rows_BKD)
    return ((left_BD - out_BD) ** 2).sum(-1)

  active_BK = vals_BK > 0
  terms = {
    'own': vals_BK.sum(-1),
    'refined': new_BK.sum(-1),
    'error': error(vals_BK),
    'error_refined': error(new_BK),
    'total': ((x_BD - mean_D) ** 2).sum(-1),
    'dropped': (active_BK & (new_BK <= 0)).sum(-1),
    'active': active_BK.sum(-1),
  }
  return arrays.whole(terms, shape.mesh)


def refined(
  rows_BKD: jax.Array, target_BD: jax.Array, vals_BK: jax.Array
) -> jax.Array:
  """The magnitudes at least 0 that reconstruct best, by coordinate descent.

  Args:
    rows_BKD: decoder rows of the active latents.
    target_BD: what is to be reconstructed, less the bias.
    vals_BK: magnitudes to begin with; where one is 0 it stays so.

  Returns:
    [B, K]; each row's squared distance is the least that there is.
  """
  is_active_BK = vals_BK > 0
  gram_BKK = jnp.einsum('bkd,bld->bkl', rows_BKD, rows_BKD)
  wanted_BK = jnp.einsum('bkd,bd->bk', rows_BKD, target_BD)
  squares_BK = jnp.diagonal(gram_BKK, axis1=1, axis2=2)

  def move(at, new_BK):
    gram_BK = jax.lax.dynamic_index_in_dim(gram_BKK, at, 1, keepdims=False)
    own_B, square_B, wanted_B, is_active_B = (
      jax.lax.dynamic_index_in_dim(of_BK, at, 1, keepdims=False)
      for of_BK in (new_BK, squares_BK, wanted_BK, is_active_BK)
    )
    left_B = wanted_B - (gram_BK * new_BK).sum(-1) + square_B * own_B
    best_B = jnp.maximum(left_B, 0) / jnp.where(square_B > 0, square_B, 1)
    best_B = jnp.where(is_active_B & (square_B > 0), best_B, own_B)
    return jax.lax.dynamic_update_index_in_dim(new_BK, best_B, at, 1)

  def sweep(carry):
    n, old_BK, _ = carry
    new_BK = jax.lax.fori_loop(0, vals_BK.shape[1], move, old_BK)
    moved_B = jnp.abs(new_BK - old_BK).max(-1)
    return n + 1, new_BK, (moved_B > _TOLERANCE * new_BK.max(-1)).any()

  start = jnp.zeros((), jnp.int32), vals_BK, jnp.ones((), bool)
  return jax.lax.while_loop(
    lambda carry: carry[2] & (carry[0] < _SWEEPS), sweep, start
  )[1]
