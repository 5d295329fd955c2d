"""Counts, moments and histograms of each latent's active values."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.probing.scan import double, runs
from sae_jax.probing.scan.double import Double
from sae_jax.probing.scan.pairs import Pairs

# Twenty bins per decade of activation; the first and the last bin also hold
# the values beyond them.
HISTOGRAM_EDGES = np.logspace(-5, 3, 161)
# The least float32 not below each edge: the same values are on either side.
EDGES = HISTOGRAM_EDGES.astype(np.float32)
EDGES = np.where(
  EDGES < HISTOGRAM_EDGES, np.nextafter(EDGES, np.float32(np.inf)), EDGES
)
BINS = len(EDGES) - 1
# Floats that agree in all but so many bits, of which no two edges do, and how
# many edges are not above the least of each.
_CELL_BITS = 18
_EDGES_BEFORE = np.searchsorted(
  EDGES,
  (np.arange(2 ** (32 - _CELL_BITS), dtype=np.uint32) << _CELL_BITS).view(
    np.float32
  ),
  side='right',
).astype(np.uint8)


@flax.struct.dataclass
class State:
  """Sums over the pairs of each latent.

  Attributes:
    count_hi_N: upper 32 bits of the number of pairs.
    count_lo_N: lower 32 bits.
    rank_hi_N: upper 32 bits of the sum of ranks.
    rank_lo_N: lower 32 bits.
    value_N: sum of the values.
    square_N: sum of their squares.
    cube_N: sum of their cubes.
    margin_N: sum of the margins.
    max_N: the greatest value, 0 if there is none.
    hist_NH: values in each bin; the first and the last bin hold those beyond.
  """

  count_hi_N: jax.Array
  count_lo_N: jax.Array
  rank_hi_N: jax.Array
  rank_lo_N: jax.Array
  value_N: Double
  square_N: Double
  cube_N: Double
  margin_N: Double
  max_N: jax.Array
  hist_NH: jax.Array


@dataclasses.dataclass(frozen=True)
class Statistics:
  """count, max, mean, std, skew, hist_counts, rank_mean and margin_mean."""

  def init(self, n_own: int) -> State:
    # Arrays of their own, so that a step can be given them to overwrite.
    return State(
      *(jnp.zeros(n_own, jnp.uint32) for _ in range(4)),
      *(double.zeros((n_own,)) for _ in range(4)),
      max_N=jnp.zeros(n_own, jnp.float32),
      hist_NH=jnp.zeros((n_own, BINS), jnp.uint32),
    )

  def update(self, state: State, pairs: Pairs) -> State:
    fires_U = pairs.stop_U > pairs.start_U
    last_U = jnp.maximum(pairs.stop_U - 1, 0)
    real_P = pairs.real_P
    value_P = jnp.where(real_P, pairs.value_P, 0)
    square_P = double.product(value_P, value_P)
    margin_P = jnp.where(real_P, pairs.margin_P, 0)
    max_U, sums_U = runs.totals(
      pairs.latent_P,
      last_U,
      value_P,
      (
        double.of(value_P),
        square_P,
        double.scale(square_P, value_P),
        double.of(margin_P),
      ),
    )
    # Differences of sums that wrap around are right all the same.
    rank_P = jnp.cumsum(jnp.where(real_P, pairs.rank_P, 0).astype(jnp.uint32))
    first_U = jnp.minimum(pairs.start_U, len(rank_P) - 1)
    rank_U = rank_P[last_U] - rank_P[first_U]
    rank_U += pairs.rank_P[first_U].astype(jnp.uint32)

    def add(of_N: State) -> State:
      """The rows of latents that have pairs, with those added."""
      return State(
        *_add_words(
          of_N.count_hi_N, of_N.count_lo_N, 0, pairs.stop_U - pairs.start_U
        ),
        *_add_words(of_N.rank_hi_N, of_N.rank_lo_N, 0, rank_U),
        value_N=double.add(of_N.value_N, sums_U[0]),
        square_N=double.add(of_N.square_N, sums_U[1]),
        cube_N=double.add(of_N.cube_N, sums_U[2]),
        margin_N=double.add(of_N.margin_N, sums_U[3]),
        max_N=jnp.maximum(of_N.max_N, max_U),
        hist_NH=None,
      )

    def put(of_N, of_U):
      of_U = jnp.where(fires_U, of_U, of_N[latent_U])
      return of_N.at[pairs.latent_U].set(of_U, mode='drop')

    latent_U = jnp.minimum(pairs.latent_U, pairs.n_own - 1)
    scalars = state.replace(hist_NH=None)
    if len(latent_U) == pairs.n_own:
      new = jax.tree.map(
        lambda of_N, of_U: jnp.where(fires_U, of_U, of_N),
        scalars,
        add(scalars),
      )
    else:
      own = jax.tree.map(lambda of_N: of_N[latent_U], scalars)
      new = jax.tree.map(put, scalars, add(own))
    # One scatter of few numbers: no [N, H] is made for a batch.
    return new.replace(
      hist_NH=state.hist_NH.at[pairs.latent_P, bins(value_P)].add(
        jnp.uint32(1), mode='drop'
      )
    )

  def merge(self, a: State, b: State) -> State:
    count = _add_words(a.count_hi_N, a.count_lo_N, b.count_hi_N, b.count_lo_N)
    rank = _add_words(a.rank_hi_N, a.rank_lo_N, b.rank_hi_N, b.rank_lo_N)
    return State(
      *count,
      *rank,
      value_N=double.add(a.value_N, b.value_N),
      square_N=double.add(a.square_N, b.square_N),
      cube_N=double.add(a.cube_N, b.cube_N),
      margin_N=double.add(a.margin_N, b.margin_N),
      max_N=jnp.maximum(a.max_N, b.max_N),
      hist_NH=a.hist_NH + b.hist_NH,
    )

  def finish(self, state: State) -> dict[str, np.ndarray]:
    """The columns, of a state with numpy arrays.

    The moments are over the tokens on which the latent fired (population
    moments); 0 for a latent that never did. Where all values agree the
    deviation is 0, and where they spread by less than 1e-4 of their mean the
    skewness is 0: the sums give no more digits.
    """
    count_N = whole(state.count_hi_N, state.count_lo_N)
    most_N = np.maximum(count_N, 1)
    mean_N, square_N, cube_N, margin_N = (
      double.to_float64(of) / most_N
      for of in (state.value_N, state.square_N, state.cube_N, state.margin_N)
    )
    variance_N = np.maximum(square_N - mean_N**2, 0)
    # Differences of equal values are rounding, not spread.
    variance_N[variance_N < 1e-12 * square_N] = 0
    third_N = cube_N - 3 * mean_N * square_N + 2 * mean_N**3
    std_N = np.sqrt(variance_N)
    skew_N = np.divide(
      third_N,
      std_N**3,
      out=np.zeros_like(std_N),
      where=variance_N > 1e-8 * square_N,
    )
    return {
      'count': count_N,
      'max': np.asarray(state.max_N, np.float64),
      'mean': mean_N,
      'std': std_N,
      'skew': skew_N,
      'hist_counts': np.asarray(state.hist_NH, np.int64),
      'rank_mean': whole(state.rank_hi_N, state.rank_lo_N) / most_N,
      'margin_mean': margin_N,
    }


def bins(value_P: jax.Array) -> jax.Array:
  """The bin of each value: numpy's searchsorted on the edges."""

  def by_cells(value_P):
    bits_P = jax.lax.bitcast_convert_type(value_P, jnp.uint32)
    place_P = jnp.asarray(_EDGES_BEFORE)[
      (bits_P >> _CELL_BITS).astype(jnp.int32)
    ]
    place_P = place_P.astype(jnp.int32)
    next_P = jnp.asarray(np.append(EDGES, np.float32(np.inf)))[place_P]
    return place_P + (value_P >= next_P)

  def by_comparisons(value_P):
    place_P = jnp.searchsorted(
      jnp.asarray(EDGES), value_P, side='right', method='compare_all'
    )
    return place_P.astype(jnp.int32)

  # A TPU compares with all edges faster than it looks two of them up.
  place_P = jax.lax.platform_dependent(
    value_P, cpu=by_cells, default=by_comparisons
  )
  return jnp.clip(place_P - 1, 0, BINS - 1)


def _add_words(a_hi, a_lo, b_hi, b_lo):
  """Sum of two numbers of two uint32 words."""
  b_lo = jnp.asarray(b_lo).astype(jnp.uint32)
  lo = a_lo + b_lo
  return a_hi + jnp.uint32(b_hi) + (lo < b_lo).astype(jnp.uint32), lo


def whole(hi, lo) -> np.ndarray:
  """Numbers of two words, int64 on the host."""
  return np.asarray(hi, np.int64) << 32 | np.asarray(lo, np.int64)
