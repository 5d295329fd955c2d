"""Lists of the best pairs of each latent; inserting pairs, merging lists."""

from collections.abc import Sequence
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.probing.scan import order

_NO_ROW = np.uint32(0xFFFFFFFF)


@flax.struct.dataclass
class Best:
  """The best pairs of each latent, best first.

  Attributes:
    key_NM: what they are ordered by, the highest first, uint32; 0 where there
      is none.
    row_hi_NM: upper 32 bits of the row; ties go to the lower row. All bits are
      ones where there is none.
    row_lo_NM: lower 32 bits.
    value_NM: value of the pair, float32; 0 where there is none.
    document_NM: document of the row, int32; -1 where there is none.
  """

  key_NM: jax.Array
  row_hi_NM: jax.Array
  row_lo_NM: jax.Array
  value_NM: jax.Array
  document_NM: jax.Array


def none(n: int, m: int) -> Best:
  """Lists without pairs."""
  return Best(
    key_NM=jnp.zeros((n, m), jnp.uint32),
    row_hi_NM=jnp.full((n, m), _NO_ROW),
    row_lo_NM=jnp.full((n, m), _NO_ROW),
    value_NM=jnp.zeros((n, m), jnp.float32),
    document_NM=jnp.full((n, m), -1, jnp.int32),
  )


def insert(
  lists: Best, latent_C: jax.Array, offers: Best, distinct: bool
) -> Best:
  """The best of what the lists hold and of what is offered.

  Only the lists of latents with offers are read and written.

  Args:
    lists: of N latents.
    latent_C: the latent of each offer; N where the offer is none. Offers of a
      latent follow each other.
    offers: flat arrays; those of a latent are best first. None of them is in
      the lists.
    distinct: whether a latent keeps the best pair of each document alone.
  """
  n, m = lists.key_NM.shape
  is_offer_C = latent_C < n
  is_first_C = (latent_C != jnp.roll(latent_C, 1)).at[0].set(True)
  all_lists = n <= len(latent_C)
  if all_lists:
    list_C, own = latent_C, lists
  else:
    list_C = jnp.cumsum(is_first_C, dtype=jnp.int32) - 1
    latent_U = jnp.full(len(latent_C), n).at[list_C].set(latent_C)
    own = _rows(lists, latent_U)
    list_C = jnp.where(is_offer_C, list_C, len(latent_C))
  n_lists = len(own.key_NM)

  of_offer = _rows(own, list_C)
  offers_C1 = jax.tree.map(lambda of_C: of_C[:, None], offers)
  is_before_CM = is_before(_places(offers_C1), _places(of_offer))
  beaten_UM = jnp.zeros((n_lists, m), bool)
  if distinct:
    is_offer_C &= ~order.repeated(latent_C, offers.document_NM)
    is_same_CM = of_offer.document_NM == offers.document_NM[:, None]
    is_offer_C &= ~(is_same_CM & ~is_before_CM).any(1)
    loser_CM = is_same_CM & is_before_CM & is_offer_C[:, None]
    loser_C = jnp.where(loser_CM.any(1), jnp.argmax(loser_CM, 1), m)
    beaten_UM = beaten_UM.at[list_C, loser_C].set(True, mode='drop')

  # An offer's place: offers and listed pairs that are better.
  offers_before_C = jnp.cumsum(is_offer_C, dtype=jnp.int32) - is_offer_C
  base_C = jax.lax.cummax(jnp.where(is_first_C, offers_before_C, 0))
  is_better_CM = ~is_before_CM & ~_row(beaten_UM, list_C)
  place_C = offers_before_C - base_C + is_better_CM.sum(1, dtype=jnp.int32)
  place_C = jnp.where(is_offer_C, place_C, m)
  # A listed pair's place: listed pairs before it, and offers that are better.
  ahead_C = jnp.where(is_offer_C, (~is_before_CM).sum(1, dtype=jnp.int32), m)
  new_UM = jnp.zeros((n_lists, m), jnp.int32)
  new_UM = new_UM.at[list_C, ahead_C].add(1, mode='drop')
  stays_UM = ~beaten_UM
  place_UM = jnp.cumsum(stays_UM, 1) - stays_UM + jnp.cumsum(new_UM, 1)
  place_UM = jnp.where(stays_UM, place_UM, m)
  move = _mover(place_UM)

  def put(empty_UM, own_UM, offer_C):
    moved_UM = _filled([move(own_UM)], empty_UM)
    return moved_UM.at[list_C, place_C].set(offer_C, mode='drop')

  own = jax.tree.map(put, none(n_lists, m), own, offers)
  if all_lists:
    return own
  return jax.tree.map(
    lambda of_NM, of_UM: of_NM.at[latent_U].set(of_UM, mode='drop'), lists, own
  )


def merge(a: Best, b: Best, distinct: bool) -> Best:
  """The best of two lists of each latent, which have no pair in common.

  Every latent is by itself: lists that are sharded by latent stay so.
  """
  n, m = a.key_NM.shape
  is_a_before_NMM = is_before(
    [of_NM[:, :, None] for of_NM in _places(a)],
    [of_NM[:, None, :] for of_NM in _places(b)],
  )
  a_stays_NM = b_stays_NM = jnp.ones((n, m), bool)
  if distinct:
    is_same_NMM = a.document_NM[:, :, None] == b.document_NM[:, None, :]
    a_stays_NM = ~(is_same_NMM & ~is_a_before_NMM).any(2)
    b_stays_NM = ~(is_same_NMM & is_a_before_NMM).any(1)

  def place(stays_NM, others_before_NM):
    own_before_NM = jnp.cumsum(stays_NM, 1) - stays_NM
    return jnp.where(stays_NM, own_before_NM + others_before_NM, m)

  b_before_NM = (~is_a_before_NMM & b_stays_NM[:, None, :]).sum(2)
  a_before_NM = (is_a_before_NMM & a_stays_NM[:, :, None]).sum(1)
  move_a = _mover(place(a_stays_NM, b_before_NM))
  move_b = _mover(place(b_stays_NM, a_before_NM))
  return jax.tree.map(
    lambda empty_NM, a_NM, b_NM: _filled(
      [move_a(a_NM), move_b(b_NM)], empty_NM
    ),
    none(n, m),
    a,
    b,
  )


def _mover(place_NM: jax.Array):
  """Moves entries of lists to places, those with the place M nowhere.

  What it returns takes an array and gives the bits at each place, and where
  there are any. No two entries have one place.
  """
  is_moved_NMM = place_NM[:, :, None] == jnp.arange(place_NM.shape[1])

  def move(of_NM):
    # As integers: sums of floats that are tiny may be 0.
    bits_NM = jax.lax.bitcast_convert_type(of_NM, jnp.uint32)
    bits_NM = jnp.where(is_moved_NMM, bits_NM[:, :, None], 0)
    return bits_NM.sum(1, dtype=jnp.uint32), is_moved_NMM.any(1)

  return move


def _filled(moved, empty_NM: jax.Array) -> jax.Array:
  """What was moved, and what stands for nothing elsewhere."""
  bits_NM = sum(bits_NM for bits_NM, _ in moved)
  is_there_NM = functools.reduce(jnp.logical_or, [there for _, there in moved])
  moved_NM = jax.lax.bitcast_convert_type(bits_NM, empty_NM.dtype)
  return jnp.where(is_there_NM, moved_NM, empty_NM)


def _row(of_NM: jax.Array, at: jax.Array) -> jax.Array:
  return of_NM.at[at].get(mode='clip')


def _rows(lists: Best, at: jax.Array) -> Best:
  return jax.tree.map(lambda of_NM: _row(of_NM, at), lists)


def is_before(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
  """Whether pairs come before others: higher key, then lower row.

  Args:
    a: their keys, and the upper and lower 32 bits of their rows.
    b: those of the others.
  """
  (key, row_hi, row_lo), (other_key, other_hi, other_lo) = a, b
  is_lower = row_hi < other_hi
  is_lower |= (row_hi == other_hi) & (row_lo < other_lo)
  return (key > other_key) | ((key == other_key) & is_lower)


def _places(lists: Best) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What pairs are ordered by."""
  return lists.key_NM, lists.row_hi_NM, lists.row_lo_NM
