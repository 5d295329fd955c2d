"""Progressive recovery: reconstructions by fewer or more latents than trained.

With the k' largest pre-activations of each token, or with all that exceed one
threshold for all tokens.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.probing.suite import arrays
from sae_jax.probing.suite import scored as scored_lib
from sae_jax.probing.suite.context import Context
from sae_jax.probing.suite.figures import ratio, Statistic
from sae_jax.probing.suite.outcome import Outcome

TITLE = 'Progressive recovery'
ABOUT = """How well an autoencoder reconstructs with another number of active
latents than it was trained with: the k' largest pre-activations of each token,
or all that exceed a threshold that is the same for every token and is chosen on
validation rows so that k' exceed it on average. An autoencoder whose latents
stand for parts of the activation gets better with each one, up to its own k at
least; one that is fitted to exactly k gets worse beyond it.

The error is the fraction of variance unexplained on test rows, the variance
about the mean of validation rows. Gao et al. (2024), section 5.3."""
UNIT = 'documents'


@dataclasses.dataclass(frozen=True)
class Size:
  """What is measured; rows of each draw."""

  rows: int
  batch_rows: int = 128


SIZES = {'quick': Size(1024), 'all': Size(20_000)}
# Active latents are tried up to so many times those that it was trained with.
_TIMES = 4
# Candidates of a token for a threshold, in units of the most on average: a
# token that more exceed is cut there.
_CANDIDATES = 2
_VALIDATION_ROWS = 4096

STATISTICS = {
  'fvu': Statistic(
    'FVU',
    'Fraction of variance unexplained with as many latents as of its largest '
    'that it was trained with.',
    ratio('error', 'variance'),
    better='low',
    orders=True,
  ),
  'fvu_topk': Statistic(
    "FVU by k'",
    "Fraction of variance unexplained with the k' largest latents of each "
    'token.',
    ratio('error_topk', 'variance_points'),
    better='low',
    points='latents',
  ),
  'fvu_threshold': Statistic(
    'FVU by threshold',
    'Fraction of variance unexplained with all latents above one threshold, '
    "which k' of a token exceed on average.",
    ratio('error_threshold', 'variance_points'),
    better='low',
    points='latents',
  ),
  'l0_threshold': Statistic(
    'L0 by threshold',
    'Latents of a token above the threshold, on average on test rows.',
    ratio('l0_threshold', 'rows_points'),
    points='latents',
  ),
}


def measure(context: Context) -> Outcome:
  size = SIZES[context.size]
  points = _points(context.itself.shape.width)
  drawn = context.rows(size.rows)
  own = {
    name: _Points.of(context, name, points, size.batch_rows)
    for name in context.scored
  }
  samples = context.sums_of_rows(
    drawn,
    size.batch_rows,
    lambda name, scored, raw_BD: _terms(
      *scored, raw_BD, own[name].latents, own[name].mean_D, own[name].least_P
    ),
    'recovery',
  )
  return Outcome(samples, {'latents': np.array(points)})


def _points(k: int) -> list[int]:
  """Powers of two up to a few times k, and k itself."""
  powers = [2**i for i in range((_TIMES * k).bit_length())]
  return sorted({*powers, k})


class _Points(NamedTuple):
  """The points of the curves for one autoencoder.

  Attributes:
    latents: active ones of a token.
    least_P: thresholds that so many exceed on average.
    mean_D: the mean of its inputs.
  """

  latents: tuple[int, ...]
  least_P: np.ndarray
  mean_D: np.ndarray

  @classmethod
  def of(cls, context: Context, name: str, points: list[int], batch_rows: int):
    """Chosen on validation rows."""
    shape, sae = context.scored[name]
    latents = tuple(min(point, shape.config.n_latents) for point in points)
    raw_BD = context.chosen_on(_VALIDATION_ROWS)
    values = []
    for start, stop in arrays.batches(batch_rows, len(raw_BD), context.mesh):
      part = arrays.on_data(raw_BD[start:stop], batch_rows, context.mesh)
      vals_BW = _values(shape, _width(shape, latents), sae, part)
      values.append(arrays.to_host(vals_BW, stop - start))
    # Of all candidates of all tokens, as many as the tokens times k'.
    order = -np.sort(-np.concatenate(values), axis=None)
    places = np.minimum(np.array(latents) * len(raw_BD), len(order)) - 1
    return cls(latents, order[places], context.mean(name))


def _width(shape, latents) -> int:
  """Candidates of a token."""
  return min(_CANDIDATES * latents[-1], shape.config.n_latents)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _values(shape, width, sae, raw_BD):
  vals_BW, _ = scored_lib.ranked(shape, sae, raw_BD, width)
  return arrays.whole(vals_BW, shape.mesh)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _terms(shape, sae, raw_BD, latents, mean_D, least_P):
  """What each row adds."""
  x_BD, left_BD = scored_lib.wanted(shape, sae, raw_BD)
  vals_BW, idx_BW = scored_lib.ranked(
    shape, sae, raw_BD, _width(shape, latents)
  )
  rows_BWD = scored_lib.rows(shape, sae.w_dec_ND, idx_BW)
  # Each next latent takes its part away.
  parts_BWD = vals_BW[:, :, None] * rows_BWD
  errors_BW = ((left_BD[:, None] - jnp.cumsum(parts_BWD, 1)) ** 2).sum(-1)
  errors_BW = jnp.concatenate(
    [(left_BD**2).sum(-1, keepdims=True), errors_BW], 1
  )
  above_BP = (vals_BW[:, :, None] >= least_P).sum(1)
  # A value of 0 is no active latent.
  above_BP = jnp.minimum(above_BP, (vals_BW > 0).sum(1)[:, None])
  variance_B = ((x_BD - mean_D) ** 2).sum(-1)
  as_points = jnp.ones(len(latents))
  own = min(shape.width, errors_BW.shape[1] - 1)
  terms = {
    'error': errors_BW[:, own],
    'variance': variance_B,
    'error_topk': errors_BW[:, np.array(latents)],
    'error_threshold': jnp.take_along_axis(errors_BW, above_BP, axis=1),
    'l0_threshold': above_BP.astype(jnp.float32),
    'variance_points': variance_B[:, None] * as_points,
    'rows_points': jnp.ones_like(variance_B)[:, None] * as_points,
  }
  return arrays.whole(terms, shape.mesh)
