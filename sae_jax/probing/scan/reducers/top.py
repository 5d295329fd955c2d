"""The M best pairs of each latent, by value or at random."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.probing.scan import best, counter_hash, order
from sae_jax.probing.scan.best import Best
from sae_jax.probing.scan.pairs import Pairs, Slots

# Pairs that are offered at a time: a sort and a merge of fewer takes no less.
_LEAST_OFFERS = 1024
# Of sorted pairs those of a latent and document are neighbours: most that are
# not the best of them are seen by that, and not offered.
_NEIGHBOURS = (1, -1, 2, -2)


@dataclasses.dataclass(frozen=True)
class Top:
  """The best pairs of each latent: rows, values, documents.

  Attributes:
    name: what the columns begin with, such as 'top'.
    n_examples: M, pairs that are kept of each latent.
    key: 'value' for the highest values, 'random' for a uniform sample.
    group: 'document' to keep the best pair of each document, 'row' for all.
    seed: of the sample.
  """

  name: str
  n_examples: int
  key: typing.Literal['value', 'random'] = 'value'
  group: typing.Literal['document', 'row'] = 'row'
  seed: int = 0

  def init(self, n_own: int) -> Best:
    return best.none(n_own, self.n_examples)

  def update(self, state: Best, pairs: Slots) -> Best:
    if not self.n_examples:
      return state
    key_P = self._keys(pairs)
    # Most pairs can't displace a latent's worst example and are not looked at
    # again; the others are offered some at a time.
    worst_P = state.key_NM[:, -1].at[pairs.latent_P].get(mode='clip')
    hopeful_P = pairs.real_P & (key_P >= worst_P)
    n_offers = offers_at_a_time(len(key_P))
    if self.group == 'document':
      hopeful_P = _without_beaten(pairs, key_P, hopeful_P, n_offers)
    n_hopeful = hopeful_P.sum()
    slot_P = jnp.pad(
      order.front(hopeful_P), (0, n_offers), constant_values=len(key_P)
    )

    def offer(carry):
      at, state = carry
      slot_C = jax.lax.dynamic_slice(slot_P, (at,), (n_offers,))
      return at + n_offers, self._offer(state, pairs, key_P, slot_C)

    _, state = jax.lax.while_loop(
      lambda carry: carry[0] < n_hopeful, offer, (0, state)
    )
    return state

  def _offer(self, state, pairs, key_P, slot_C):
    """Adds the pairs of some slots; P stands for none."""

    def pick(of_P):
      return of_P.at[slot_C].get(mode='clip')

    latent_C = pairs.latent_P.at[slot_C].get(
      mode='fill', fill_value=pairs.n_own
    )
    order_C = ~pick(key_P), pick(pairs.row_hi_P), pick(pairs.row_lo_P)
    latent_C, worse_C, row_hi_C, row_lo_C, slot_C = jax.lax.sort(
      (latent_C, *order_C, slot_C), num_keys=4, is_stable=False
    )
    offers = Best(
      key_NM=~worse_C,
      row_hi_NM=row_hi_C,
      row_lo_NM=row_lo_C,
      value_NM=pick(pairs.value_P),
      document_NM=pick(pairs.document_P),
    )
    return best.insert(
      state, latent_C, offers, distinct=self.group == 'document'
    )

  def merge(self, a: Best, b: Best) -> Best:
    return best.merge(a, b, distinct=self.group == 'document')

  def finish(self, state: Best) -> dict[str, np.ndarray]:
    """Columns of [n, M], of a state with numpy arrays; rows are -1 for none."""
    hi_NM = np.asarray(state.row_hi_NM).astype(np.uint64)
    row_NM = hi_NM << np.uint64(32) | np.asarray(state.row_lo_NM)
    return {
      f'{self.name}_rows': row_NM.astype(np.int64),
      f'{self.name}_values': np.asarray(state.value_NM, np.float64),
      f'{self.name}_documents': np.asarray(state.document_NM, np.int64),
    }

  def _keys(self, pairs: Slots) -> jax.Array:
    """What pairs are ordered by, uint32."""
    if self.key == 'value':
      # The bits of positive floats have the order of the floats.
      return jax.lax.bitcast_convert_type(pairs.value_P, jnp.uint32)
    return counter_hash.random_key(
      pairs.row_hi_P,
      pairs.row_lo_P,
      pairs.first_latent + pairs.latent_P,
      self.seed,
    )


def offers_at_a_time(slots: int) -> int:
  """Pairs that are offered to the lists at a time, of so many slots."""
  return min(max(_LEAST_OFFERS, slots // 64), slots)


def _without_beaten(
  pairs: Slots, key_P: jax.Array, hopeful_P: jax.Array, n_offers: int
) -> jax.Array:
  """The hopeful pairs, without most that are not the best of their document."""

  def by_hashes(pairs, key_P, hopeful_P):
    key_P = jnp.where(hopeful_P, key_P, 0)
    return jax.lax.cond(
      hopeful_P.sum() > 4 * n_offers,
      lambda: (
        hopeful_P & ~order.beaten_cpu(pairs.latent_P, pairs.document_P, key_P)
      ),
      lambda: hopeful_P,
    )

  def by_neighbours(pairs, key_P, hopeful_P):
    if isinstance(pairs, Pairs):
      hopeful_P &= ~_has_better_neighbour(pairs, key_P)
    return hopeful_P

  return jax.lax.platform_dependent(
    pairs, key_P, hopeful_P, cpu=by_hashes, default=by_neighbours
  )


def _has_better_neighbour(pairs: Pairs, key_P: jax.Array) -> jax.Array:
  """Whether a slot nearby has a better pair of the same latent and document."""
  of_P = pairs.latent_P, pairs.document_P, key_P, pairs.row_hi_P, pairs.row_lo_P
  is_worse_P = jnp.zeros(key_P.shape, bool)
  for distance in _NEIGHBOURS:
    latent_P, document_P, *other = (jnp.roll(a, distance) for a in of_P)
    is_same_P = latent_P == pairs.latent_P
    is_same_P &= document_P == pairs.document_P
    is_worse_P |= is_same_P & best.is_before(other, of_P[2:])
  return is_worse_P
