"""What a pass over some tokens is asked for, and what it leaves."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from sae_jax.ops import varying


@dataclasses.dataclass(frozen=True)
class How:
  """What is the same for all tokens of a pass; see `autoencode`.

  Attributes:
    ks: active latents of a token, ascending; each gives a reconstruction.
    axis: the mesh axis of the latents, inside shard_map.
    dtype: of the factors of products.
    candidates: that a shard offers, with kernels; None for as many as may win.
    recall: share of a shard's top candidates that kernels are asked to find.
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
    redone: number of tokens that a kernel encoded again, or all of a batch of
      which a shard's candidates were not enough.
    recall: sum over tokens of the share of a shard's top candidates that is
      expected to be found.
  """

  redone: jax.Array
  recall: jax.Array

  @classmethod
  def exact(cls, tokens: int, dtype: jnp.dtype, like: jax.Array):
    """Those of a search that finds every candidate at once."""
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
    failed: tokens whose top k the kernel could not vouch for, so that they
      were encoded again; a share of the batch, 0 with other implementations.
    exhausted: whether some token's winners are all of this shard's candidates
      and fewer than k, so that there may be more; all of it is to be done
      again with k candidates then. False where those were asked for.
    recall: the share of this shard's top candidates that is expected to be
      found, 1 if all are.
  """

  vals_BK: jax.Array
  idx_BK: jax.Array
  models: tuple[jax.Array, ...]
  failed: jax.Array
  exhausted: jax.Array
  recall: jax.Array

  @property
  def diagnostics(self) -> Diagnostics:
    """Of all its tokens."""
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
