"""Settings and results of `autoencode`."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from sae_jax.ops import varying


@dataclasses.dataclass(frozen=True)
class How:
  """Static settings of a pass; see `autoencode`.

  Attributes:
    ks: active latents of a token, ascending; each gives a reconstruction.
    axis: the mesh axis of the latents, inside shard_map.
    dtype: of the factors of products.
    candidates: number of candidates that a shard offers of each token, with
      kernels; None for as many as may win.
    recall: share of a shard's top candidates that kernels must be expected to
      find.
  """

  ks: tuple[int, ...]
  axis: str | None = None
  dtype: jnp.dtype | None = None
  candidates: int | None = None
  recall: float = 1.0

  @property
  def shards(self) -> int:
    """How many shards the latents have."""
    return 1 if self.axis is None else jax.lax.axis_size(self.axis)


@flax.struct.dataclass
class Diagnostics:
  """How exact and how costly an approximate search for candidates was.

  Attributes:
    redone: number of tokens that were encoded again: those that failed the
      kernel's test, or all of a batch if a shard's candidates were too few.
    recall: sum over tokens of the share of a shard's top candidates that the
      search is expected to find.
  """

  redone: jax.Array
  recall: jax.Array

  @classmethod
  def exact(cls, tokens: int, dtype: jnp.dtype, like: jax.Array):
    """Diagnostics of a search that finds every candidate at once."""
    redone = varying.zeros((), dtype, like)
    return cls(redone=redone, recall=redone + tokens)


@flax.struct.dataclass
class Coded:
  """A shard's codes and its part of the reconstructions.

  Attributes:
    vals_BK: values of the active latents for the first of the ks, 0 for a
      candidate that is not active. No gradient passes through them.
    idx_BK: their latents.
    models: sum_k vals[b, k] w_dec[idx[b, k]] for each of the ks, [B, D].
    failed: share of the batch's tokens whose top k the kernel could not vouch
      for, so that they were encoded again; 0 with other implementations.
    exhausted: whether for some token all of this shard's candidates won, and
      they were fewer than k, so that there may be more winners: then the batch
      must be done again with k candidates. False if there were k.
    recall: the share of this shard's top candidates that the search is
      expected to find, 1 if all.
  """

  vals_BK: jax.Array
  idx_BK: jax.Array
  models: tuple[jax.Array, ...]
  failed: jax.Array
  exhausted: jax.Array
  recall: jax.Array

  @property
  def diagnostics(self) -> Diagnostics:
    """Diagnostics of all its tokens."""
    tokens = self.vals_BK.shape[0]
    return Diagnostics(redone=self.failed * tokens, recall=self.recall * tokens)


def plain(x_BD, vals_BK, idx_BK, models) -> Coded:
  """A `Coded` of an implementation that examines every latent.

  Nothing failed, was exhausted or is missed.
  """
  return Coded(
    vals_BK=vals_BK,
    idx_BK=idx_BK,
    models=models,
    failed=varying.zeros((), x_BD.dtype, vals_BK),
    exhausted=varying.zeros((), bool, vals_BK),
    recall=varying.match(jnp.ones((), x_BD.dtype), vals_BK),
  )
