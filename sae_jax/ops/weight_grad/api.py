"""`weight_grad`: the one segment sum behind both weight gradients."""

import jax
import jax.numpy as jnp

from sae_jax.ops import chip, dispatch, pairs, scopes
from sae_jax.ops.weight_grad import kernel, reference


@jax.named_scope(scopes.WEIGHT_GRADIENTS)
def weight_grad(
  vals_BK: jax.Array,
  idx_BK: jax.Array,
  g_BD: jax.Array,
  n_latents: int,
  *,
  dtype: jnp.dtype | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Row n of the result is the sum of vals[b, k] g[b] over idx[b, k] = n.

  With the codes and the output's cotangent it is the decoder's gradient, with
  the values' cotangent and the input it is the encoder's.

  Args:
    vals_BK: weights of the pairs.
    idx_BK: the latent of each pair.
    g_BD: a row per token.
    n_latents: N.
    dtype: of the factors of a dense product, see `matmul`.
    implementation: see `decode`.

  Returns:
    The sums, [N, D].
  """
  name = dispatch.choose(
    n_latents, idx_BK.shape[1], implementation, g_BD.shape[1]
  )
  arrays = map(jnp.asarray, (vals_BK, idx_BK, g_BD))
  if name == 'dense':
    return reference.dense_outer(*arrays, n_latents, dtype)
  if name == 'pallas':
    return _by_kernel(*arrays, n_latents, dtype)
  return reference.scatter_rows(*arrays, n_latents)


def _by_kernel(vals_BK, idx_BK, g_BD, n_latents, dtype):
  # Blocks of one token: `by_latent` sorts across blocks in any case.
  blocks = pairs.blocks(vals_BK, idx_BK, 1, pack=False)
  count, latent_P, token_P, vals_P = pairs.by_latent(
    blocks, n_latents, blocks.vals_GR
  )
  (grad_ND,), _ = kernel.segment_sums(
    latent_P,
    token_P,
    (vals_P,),
    (g_BD,),
    n_latents,
    count,
    dtype=dtype,
    interpret=chip.interpret(),
  )
  return grad_ND
