"""How many pairs each latent has."""

import dataclasses

import flax.struct
import numpy as np

from sae_jax.probing.scan import double, order
from sae_jax.probing.scan import sums as sums_lib
from sae_jax.probing.scan.double import Double
from sae_jax.probing.scan.pairs import Slots


@flax.struct.dataclass
class State:
  """The number of pairs, exact up to 2**46."""

  count_N: Double


@dataclasses.dataclass(frozen=True)
class Count:
  """A column of the number of pairs.

  Attributes:
    name: of the column.
  """

  name: str

  def init(self, n_own: int) -> State:
    return State(double.zeros((n_own,)))

  def update(self, state: State, pairs: Slots) -> State:
    count_N = order.counts(pairs.latent_P, pairs.n_own)
    return State(double.add(state.count_N, sums_lib.whole(count_N)))

  def merge(self, a: State, b: State) -> State:
    return State(double.add(a.count_N, b.count_N))

  def finish(self, state: State) -> dict[str, np.ndarray]:
    """The column int64, of a state with numpy arrays."""
    count_N = double.to_float64(state.count_N)
    return {self.name: count_N.astype(np.int64)}
