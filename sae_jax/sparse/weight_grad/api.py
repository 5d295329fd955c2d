"""`weight_grad`: the one segment sum behind both weight gradients."""

import jax
import jax.numpy as jnp

from sae_jax.sparse import dispatch
from sae_jax.sparse.weight_grad import reference


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
    implementation: 'gather', 'dense', or None to choose by device and shape.

  Returns:
    The sums, [N, D].
  """
  name = dispatch.choose(n_latents, idx_BK.shape[1], implementation)
  arrays = map(jnp.asarray, (vals_BK, idx_BK, g_BD))
  if name == 'dense':
    return reference.dense_outer(*arrays, n_latents, dtype)
  return reference.scatter_rows(*arrays, n_latents)
