"""What a pass over some tokens leaves."""

import flax.struct
import jax
import jax.numpy as jnp

from sae_jax.ops import varying


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


def plain(x_BD, vals_BK, idx_BK, models) -> Coded:
  """What found every candidate at once."""
  return Coded(
    vals_BK=vals_BK,
    idx_BK=idx_BK,
    models=models,
    failed=varying.zeros((), x_BD.dtype, vals_BK),
    exhausted=varying.zeros((), bool, vals_BK),
    recall=varying.match(jnp.ones((), x_BD.dtype), vals_BK),
  )
