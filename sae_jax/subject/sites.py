"""Names of the places in a subject at which activations are read.

The scheme: `embed`, `pos_embed`, `final_norm`, and `blocks.N.KIND` of block N,
0-based, with a KIND of `KINDS`. Names of TransformerLens
(`blocks.8.hook_resid_post`) are accepted where they name a site of the scheme.
So are modules of Hugging Face's transformers (`model.layers.8`,
`transformer.h.8.mlp`), which name the module's output.
"""

import dataclasses
import re

from sae_jax import errors
from sae_jax.subject import architecture

# In the order in which a block passes them.
KINDS = {
  'resid_pre': 'the residual stream before the block',
  'attn_in': 'the normed stream that attention reads',
  'q': 'queries before they are normed or rotate, head by head',
  'k': 'keys, likewise',
  'v': 'values, head by head',
  'z': "the heads' weighted values, before attention's output matrix",
  'attn_raw': "attention's output, before a norm of it (Gemma 2 and 3)",
  'attn_out': 'what attention adds to the stream',
  'resid_mid': 'the stream between attention and feed-forward',
  'mlp_in': 'the normed stream that the feed-forward reads',
  'mlp_act': "the feed-forward's hidden activations",
  'mlp_raw': "the feed-forward's output, before a norm of it",
  'mlp_out': 'what the feed-forward adds to the stream',
  'resid_post': 'the residual stream after the block',
}
WHOLE = {
  'embed': 'embedded tokens, scaled, without positions',
  'pos_embed': 'learned positions (GPT-2)',
  'final_norm': 'the normed stream that the unembedding reads',
}

# TransformerLens, after 'blocks.N.'. Its 'hook_normalized' is left out: it is
# before the weights in some of its norms, after them in others.
_LENS = {
  f'hook_{kind}': kind
  for kind in (
    'resid_pre',
    'resid_mid',
    'resid_post',
    'attn_out',
    'mlp_out',
  )
} | {
  'attn.hook_q': 'q',
  'attn.hook_k': 'k',
  'attn.hook_v': 'v',
  'attn.hook_z': 'z',
  'mlp.hook_post': 'mlp_act',
}
_LENS_WHOLE = {'hook_embed': 'embed', 'hook_pos_embed': 'pos_embed'}

# Hugging Face, after the name of the layer.
_MODULES = {
  '': 'resid_post',
  'input_layernorm': 'attn_in',
  'ln_1': 'attn_in',
  'self_attn.q_proj': 'q',
  'self_attn.k_proj': 'k',
  'self_attn.v_proj': 'v',
  'self_attn': 'attn_raw',
  'self_attn.o_proj': 'attn_raw',
  'attn': 'attn_raw',
  'attn.c_proj': 'attn_raw',
  'attention': 'attn_raw',
  'attention.dense': 'attn_raw',
  'ln_2': 'mlp_in',
  'pre_feedforward_layernorm': 'mlp_in',
  'mlp': 'mlp_raw',
  'mlp.down_proj': 'mlp_raw',
  'mlp.c_proj': 'mlp_raw',
  'mlp.dense_4h_to_h': 'mlp_raw',
  'post_feedforward_layernorm': 'mlp_out',
}
_MODULES_WHOLE = {
  'embed_tokens': 'embed',
  'wte': 'embed',
  'embed_in': 'embed',
  'wpe': 'pos_embed',
  'norm': 'final_norm',
  'ln_f': 'final_norm',
  'final_layer_norm': 'final_norm',
}
_PREFIX = r'(?:(?:model|language_model|transformer|gpt_neox)\.)+'
_OWN_SITE = re.compile(r'blocks\.(\d+)\.(.+)')
_LAYER = re.compile(rf'(?:{_PREFIX})?(?:layers|h)\.(\d+)(?:\.(.+))?')
_MODULE = re.compile(rf'{_PREFIX}(\w+)')


@dataclasses.dataclass(frozen=True)
class Site:
  """A place in the subject; `str(site)` is its name.

  Attributes:
    block: 0-based block; None for a site outside the blocks.
    name: a key of KINDS, or of WHOLE outside the blocks.
  """

  block: int | None
  name: str

  def __str__(self) -> str:
    return (
      self.name if self.block is None else f'blocks.{self.block}.{self.name}'
    )


def lens_name(text: str) -> str:
  """TransformerLens's name of a site; the text itself if there is none."""
  match = _OWN_SITE.fullmatch(text)
  for name, kind in _LENS.items() if match else ():
    if kind == match[2]:
      return f'blocks.{match[1]}.{name}'
  for name, kind in _LENS_WHOLE.items():
    if kind == text:
      return name
  return text


def parse_site(
  text: str, config: architecture.TransformerConfig | None = None
) -> Site:
  """'blocks.14.resid_post' -> Site(14, 'resid_post').

  Args:
    text: a name of the scheme, or TransformerLens' or Hugging Face's.
    config: the subject. It is needed only for 'post_attention_layernorm', which
      is a different site in different families.

  Raises:
    UserError: if the text names no kind of site.
  """
  if text in WHOLE:
    return Site(None, text)
  if text in _LENS_WHOLE:
    return Site(None, _LENS_WHOLE[text])
  match = _OWN_SITE.fullmatch(text)
  if match:
    kind = _LENS.get(match[2], match[2])
    if kind in KINDS:
      return Site(int(match[1]), kind)
  match = _LAYER.fullmatch(text)
  if match:
    block, module = int(match[1]), match[2] or ''
    if module == 'post_attention_layernorm':
      return Site(block, _post_attention(text, block, config))
    if module in _MODULES:
      return Site(block, _MODULES[module])
  match = _MODULE.fullmatch(text)
  if match and match[1] in _MODULES_WHOLE:
    return Site(None, _MODULES_WHOLE[match[1]])
  raise errors.UserError(
    f'site {text!r} is not known: use blocks.N.KIND, as '
    f'blocks.14.resid_post, KIND one of {", ".join(KINDS)}; or '
    f'{", ".join(WHOLE)}'
  )


def _post_attention(text, block, config) -> str:
  if config is None:
    raise errors.UserError(
      f'site {text!r} is one thing in Gemma 2 and 3, another elsewhere: use '
      f'blocks.{block}.attn_out or blocks.{block}.mlp_in'
    )
  return 'attn_out' if config.post_norms else 'mlp_in'


def check_site(config: architecture.TransformerConfig, site: Site) -> None:
  """Raises UserError where the subject has no such block or site."""
  if site.block is not None and site.block >= config.n_layers:
    raise errors.UserError(
      f'site {site} is beyond the last block of this subject '
      f'({config.n_layers} blocks): use blocks.0.{site.name} '
      f'to blocks.{config.n_layers - 1}.{site.name}'
    )
  if site.name == 'pos_embed' and not config.n_positions:
    raise errors.UserError(
      'site pos_embed is not in this subject, whose positions are rotary: '
      'use embed'
    )
  if site.name == 'resid_mid' and config.parallel:
    raise errors.UserError(
      f'site {site} is not in this subject, whose attention and feed-forward '
      f'are parallel: use blocks.{site.block}.resid_pre'
    )


def width(config: architecture.TransformerConfig, site: Site) -> int:
  """Width of the activations at a site."""
  return {
    'q': config.n_heads * config.d_head,
    'z': config.n_heads * config.d_head,
    'k': config.n_kv_heads * config.d_head,
    'v': config.n_kv_heads * config.d_head,
    'mlp_act': config.d_ff,
  }.get(site.name, config.d_model)
