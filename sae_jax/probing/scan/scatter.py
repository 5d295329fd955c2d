"""Mean and scatter of rows, summed on the devices, for principal components."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.probing import baselines
from sae_jax.probing.scan import double
from sae_jax.probing.scan import sums as sums_lib
from sae_jax.probing.scan.double import Double


@flax.struct.dataclass
class Scatter:
  """Rows seen so far.

  Attributes:
    count: their number.
    mean_D: their mean.
    scatter_DD: sum of the outer squares of their distances from it.
  """

  count: Double
  mean_D: Double
  scatter_DD: Double


def init(d_model: int) -> Scatter:
  """That of no row."""
  return Scatter(
    double.zeros(()), double.zeros((d_model,)), double.zeros((d_model,) * 2)
  )


def update(state: Scatter, x_ED: jax.Array, counts_E: jax.Array) -> Scatter:
  """Adds rows, centred on their own mean (Chan, Golub and LeVeque 1983).

  Args:
    state: the rows so far.
    x_ED: rows.
    counts_E: whether a row counts.
  """
  one_E1 = counts_E.astype(x_ED.dtype)[:, None]
  count = counts_E.sum(dtype=jnp.int32)
  n = jnp.maximum(count, 1).astype(x_ED.dtype)
  centre_D = (x_ED * one_E1).sum(0) / n
  x_ED = (x_ED - centre_D) * one_E1
  # What rounding has left of the mean.
  left_D = x_ED.sum(0) / n
  scatter_DD = jnp.matmul(x_ED.T, x_ED, precision=jax.lax.Precision.HIGHEST)
  scatter_DD -= n * left_D[:, None] * left_D
  new = Scatter(
    sums_lib.whole(count),
    double.add(double.of(centre_D), double.of(left_D)),
    double.of(scatter_DD),
  )
  return merge(state, new)


def merge(a: Scatter, b: Scatter) -> Scatter:
  """Both together, which share no row."""
  count = double.add(a.count, b.count)
  n_a, n_b = (s.count.hi_N + s.count.lo_N for s in (a, b))
  share = n_b / jnp.maximum(n_a + n_b, 1)
  shift = double.add(b.mean_D, jax.tree.map(jnp.negative, a.mean_D))
  shift_D = shift.hi_N
  moved_DD = n_a * share * shift_D[:, None] * shift_D
  scatter = double.add(a.scatter_DD, b.scatter_DD)
  return Scatter(
    count,
    double.add(a.mean_D, double.scale(shift, share)),
    double.add(scatter, double.of(moved_DD)),
  )


def to_host(state: Scatter) -> baselines.PcaState:
  """The state in float64, with which `baselines` goes on."""
  count, mean_D, scatter_DD = map(
    double.to_float64, (state.count, state.mean_D, state.scatter_DD)
  )
  return baselines.PcaState(int(count), np.asarray(mean_D), scatter_DD)
