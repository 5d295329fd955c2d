"""Exact top-k in plain jax.numpy."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def sorted_top_k(x_BN: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """`jax.lax.top_k`: descending, equal values by ascending index."""
  vals_BK, idx_BK = jax.lax.top_k(x_BN, k)
  return vals_BK, idx_BK


def bucketed_top_k(
  x_BN: jax.Array,
  k: int,
  n_buckets: int,
  search: Callable[
    [jax.Array, int], tuple[jax.Array, jax.Array]
  ] = sorted_top_k,
) -> tuple[jax.Array, jax.Array]:
  """The same result without ordering the whole row.

  The k largest entries lie in the k buckets with the largest maxima. Buckets
  are runs of neighbouring entries, and the chosen ones are searched in
  ascending order, so that equal values still go to the lowest index.

  Args:
    x_BN: values; N must be a multiple of n_buckets.
    k: how many to take, at most n_buckets.
    n_buckets: how many buckets a row is split into.
    search: finds the top k of maxima and of the chosen buckets.

  Returns:
    vals_BK, descending, and idx_BK.
  """
  batch, n = x_BN.shape
  width = n // n_buckets
  x_BGW = x_BN.reshape(batch, n_buckets, width)
  _, bucket_BK = search(x_BGW.max(-1), k)
  bucket_BK = jnp.sort(bucket_BK, axis=-1)
  candidates_BKW = jnp.take_along_axis(x_BGW, bucket_BK[:, :, None], axis=1)
  vals_BK, place_BK = search(candidates_BKW.reshape(batch, k * width), k)
  idx_BK = (
    jnp.take_along_axis(bucket_BK, place_BK // width, axis=1) * width
    + place_BK % width
  )
  return vals_BK, idx_BK
