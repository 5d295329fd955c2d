"""What a direction at a site adds to the logits, as far as it is linear.

The direction goes straight to the logits, as if no block lay between: through
the matrix and the norm that put the site into the residual stream, where there
are any, the final norm and the unembedding (nostalgebraist, "interpreting GPT:
the logit lens", 2020). Scales of norms depend on the activations, not on the
direction alone, and are left out; so is a cap of the logits.
"""

import flax.struct
import jax
import jax.numpy as jnp

from sae_jax.subject import architecture
from sae_jax.subject import sites as sites_lib

# A TPU multiplies float32 in bfloat16 by default, which swaps near ties.
_EXACT = jax.lax.Precision.HIGHEST

# Matrix that puts a site's activations into the stream, of those it has one.
_OUTPUT = {'z': 'attn_out', 'mlp_act': 'down'}
# What a block's output is normed by before it is added, where it is.
_POST_NORM = {
  'z': 'attn_post_norm',
  'attn_raw': 'attn_post_norm',
  'mlp_act': 'ffn_post_norm',
  'mlp_raw': 'ffn_post_norm',
}
# What is read from the stream, and reaches it only by way of a softmax or a
# nonlinearity: its directions have no logits.
_WITHOUT_LOGITS = ('attn_in', 'q', 'k', 'v', 'mlp_in')


@flax.struct.dataclass
class Lens:
  """What lies between a site and the logits; None where there is nothing.

  Attributes:
    output_JD: the matrix that puts the site into the stream.
    post_norm_D: weights of the norm between it and the stream.
    final_norm_D: weights of the final norm.
    unembed_VD: the unembedding.
    centred: whether norms take out the mean (layer norm).
  """

  output_JD: jax.Array | None
  post_norm_D: jax.Array | None
  final_norm_D: jax.Array | None
  unembed_VD: jax.Array
  centred: bool = flax.struct.field(pytree_node=False)


def has_logits(site: sites_lib.Site) -> bool:
  """Whether a row at the site is in the stream, or a matrix puts it there."""
  return site.name not in _WITHOUT_LOGITS


def lens(
  config: architecture.TransformerConfig,
  params: architecture.Params,
  site: sites_lib.Site,
) -> Lens:
  """The lens of a site that `has_logits`."""
  blocks = params['blocks']
  output = post_norm = None
  if site.name in _OUTPUT:
    output = blocks[_OUTPUT[site.name]][site.block]
  if config.post_norms and site.name in _POST_NORM:
    post_norm = blocks[_POST_NORM[site.name]][site.block]
  return Lens(
    output_JD=output,
    post_norm_D=post_norm,
    final_norm_D=None if site.name == 'final_norm' else params['final_norm'],
    unembed_VD=params.get('unembed', params['embed']),
    centred=config.norm == 'layer',
  )


def _norm(lens: Lens, weight_D: jax.Array, rows_ND: jax.Array) -> jax.Array:
  """A norm without the scale and the bias that depend on no row."""
  if lens.centred:
    rows_ND -= rows_ND.mean(-1, keepdims=True)
  return rows_ND * weight_D


def normed(lens: Lens, rows_NJ: jax.Array) -> jax.Array:
  """Rows at the site as the unembedding reads them: float32 [N, D]."""
  rows_ND = jnp.asarray(rows_NJ, jnp.float32)
  if lens.output_JD is not None:
    rows_ND = jnp.matmul(rows_ND, lens.output_JD, precision=_EXACT)
  for weight_D in (lens.post_norm_D, lens.final_norm_D):
    if weight_D is not None:
      rows_ND = _norm(lens, weight_D, rows_ND)
  return rows_ND


def unembedded(lens: Lens, normed_ND: jax.Array) -> jax.Array:
  """Logits of `normed` rows, [N, V]."""
  return jnp.matmul(normed_ND, lens.unembed_VD.T, precision=_EXACT)


def logits(lens: Lens, rows_NJ: jax.Array) -> jax.Array:
  """What each row at the site adds to the logits: float32 [N, V]."""
  return unembedded(lens, normed(lens, rows_NJ))
