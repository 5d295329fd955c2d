"""Small random subjects, one for each way that families differ."""

import dataclasses
import functools

import jax
import numpy as np

from sae_jax.subject import transformer

LLAMA = transformer.TransformerConfig(
  n_layers=3,
  d_model=24,
  n_heads=4,
  n_kv_heads=2,
  d_head=8,
  d_ff=40,
  vocab_size=61,
  rope_base=1e3,
  norm_eps=1e-5,
  rope_pairs='half',
  tied=False,
)
GEMMA = dataclasses.replace(
  LLAMA, post_norms=True, qk_norm=True, windows=(3, 0, 3), attn_softcap=5.0
)
NEOX = dataclasses.replace(LLAMA, norm='layer', parallel=True, gated=False)
GPT2 = dataclasses.replace(
  LLAMA, norm='layer', n_positions=16, qkv_bias=True, gated=False
)
CONFIGS = {'llama': LLAMA, 'gemma': GEMMA, 'neox': NEOX, 'gpt2': GPT2}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9))


@functools.cache
def params_of(family):
  """Random parameters whose norms and biases are not the first ones."""
  rng = np.random.default_rng(0)

  def draw(path, shape):
    name = path[-1].key
    scale = shape[-2] ** -0.5 if len(shape) == 3 else 0.2
    # Else the last token hardly matters, and the same comes again and again.
    scale = 1.0 if name in ('embed', 'unembed') else scale
    norm = name.endswith('norm')
    return (norm + scale * rng.standard_normal(shape)).astype(np.float32)

  return jax.tree_util.tree_map_with_path(
    draw,
    transformer.param_shapes(CONFIGS[family]),
    is_leaf=lambda x: isinstance(x, tuple),
  )
