"""Sums of each latent's run of sorted pairs, in 48 bits."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sae_jax.probing.scan import double
from sae_jax.probing.scan.double import Double

# Pairs that are added one after the other; blocks of so many run side by side.
_STEPS = 128


def totals(
  latent_P: jax.Array,
  last_U: jax.Array,
  max_P: jax.Array,
  terms_P: Sequence[Double],
) -> tuple[jax.Array, list[Double]]:
  """The maximum and the sums of each latent's pairs.

  Blocks of 128 pairs are added in order, then the blocks of a latent pairwise,
  so that the error is that of 128 additions and a few.

  Args:
    latent_P: latent of each pair, sorted.
    last_U: the slot of the last pair of each latent.
    max_P: numbers, at least 0, whose maximum is wanted.
    terms_P: numbers whose sums are wanted.
  """
  n_blocks = -(-len(latent_P) // _STEPS)
  short = n_blocks * _STEPS - len(latent_P)

  def blocks(of_P, fill=0):
    """[steps, blocks]: each column a block."""
    of_P = jnp.pad(of_P, (0, short), constant_values=fill)
    return of_P.reshape(n_blocks, _STEPS).T

  latent_LC = blocks(latent_P, jnp.iinfo(jnp.int32).max)
  max_LC = blocks(max_P)
  terms_LTC = Double(
    jnp.stack([blocks(of.hi_N) for of in terms_P], 1),
    jnp.stack([blocks(of.lo_N) for of in terms_P], 1),
  )

  def step(before, here):
    last_C, sums = before
    latent_C, new = here
    sums = _join(_keep(latent_C == last_C, sums), new)
    return (latent_C, sums), sums

  start = jax.tree.map(lambda of: jnp.zeros_like(of[0]), (max_LC, terms_LTC))
  (end_C, ends), (max_LC, sums_LTC) = jax.lax.scan(
    step, (latent_LC[0], start), (latent_LC, (max_LC, terms_LTC))
  )

  # What a latent's pairs sum to up to the end of each block.
  def reach(i, ends):
    """Sums that reach twice as far back."""
    back_C = jnp.arange(n_blocks) - jnp.left_shift(1, i)
    is_same_C = (back_C >= 0) & (end_C[back_C] == end_C)
    return _join(_keep(is_same_C, _at(ends, back_C)), ends)

  ends = jax.lax.fori_loop(0, (n_blocks - 1).bit_length(), reach, ends)

  block_U, step_U = last_U // _STEPS, last_U % _STEPS
  before_U = jnp.maximum(block_U - 1, 0)
  goes_on_U = (block_U > 0) & (end_C[before_U] == latent_P[last_U])
  earlier = _keep(goes_on_U, _at(ends, before_U))
  # Rows of a few numbers would be padded to 128 on a TPU: one is taken at a
  # time.
  place_U = step_U * n_blocks + block_U
  sums_TU = jax.tree.map(
    lambda of: jnp.stack(
      [of[:, t].reshape(-1)[place_U] for t in range(len(terms_P))]
    ),
    sums_LTC,
  )
  max_U, sums_TU = _join(earlier, (max_LC.reshape(-1)[place_U], sums_TU))
  return max_U, [
    Double(hi_U, lo_U) for hi_U, lo_U in zip(sums_TU.hi_N, sums_TU.lo_N)
  ]


def _join(a, b):
  """The maximum and the sums of two sets of pairs."""
  return jnp.maximum(a[0], b[0]), double.add(a[1], b[1])


def _keep(is_same, arrays):
  return jax.tree.map(lambda of: jnp.where(is_same, of, 0), arrays)


def _at(arrays, place):
  return jax.tree.map(lambda of: of.at[..., place].get(mode='clip'), arrays)
