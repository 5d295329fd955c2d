"""Names of hyper-parameters and tensors of each family in GGUF files.

Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs,
and the files that its converter writes.
"""

import dataclasses
from typing import Any

from sae_jax import errors
from sae_jax.subject import transformer
from sae_jax.subject.formats import assembly

Source = assembly.Source

# Parameter -> tensor; those of a block begin with 'blocks.' and 'blk.N.'.
_TENSORS = {
  'embed': 'token_embd',
  'positions': 'position_embd',
  'final_norm': 'output_norm',
  'unembed': 'output',
  'blocks.attn_norm': 'blk.{}.attn_norm',
  'blocks.query': 'blk.{}.attn_q',
  'blocks.key': 'blk.{}.attn_k',
  'blocks.value': 'blk.{}.attn_v',
  'blocks.query_norm': 'blk.{}.attn_q_norm',
  'blocks.key_norm': 'blk.{}.attn_k_norm',
  'blocks.attn_out': 'blk.{}.attn_output',
  'blocks.attn_post_norm': 'blk.{}.post_attention_norm',
  'blocks.ffn_norm': 'blk.{}.ffn_norm',
  'blocks.gate': 'blk.{}.ffn_gate',
  'blocks.up': 'blk.{}.ffn_up',
  'blocks.down': 'blk.{}.ffn_down',
  'blocks.ffn_post_norm': 'blk.{}.post_ffw_norm',
}


@dataclasses.dataclass(frozen=True)
class Family:
  """One `general.architecture`.

  Attributes:
    fields: fields of the transformer's shape that files do not have.
    fused: whether queries, keys and values are one tensor.
    window_period: all blocks but each window_period-th have a window; 0 if the
      family has no windows.
    unscaled_blocks: number of blocks of the family's 27B model, whose scores
      are scaled by d_model / n_heads and not by d_head (Gemma 2 and 3).
  """

  fields: dict[str, Any]
  fused: bool = False
  window_period: int = 0
  unscaled_blocks: int = 0

  def sources(self, config: transformer.TransformerConfig) -> dict[str, Source]:
    """Parameter -> where it is stored."""
    shapes = transformer.param_shapes(config)
    shapes |= {f'blocks.{k}': v for k, v in shapes.pop('blocks').items()}
    sources = {}
    for name, shape in shapes.items():
      base = name.removesuffix('_bias')
      suffix = 'weight' if base == name else 'bias'
      tensor = f'{_TENSORS[base]}.{suffix}'
      matrix = len(shape) == 3
      read = assembly.turned if matrix else assembly.as_is
      index = {'blocks.query': 0, 'blocks.key': 1, 'blocks.value': 2}.get(base)
      if self.fused and index is not None:
        tensor = f'blk.{{}}.attn_qkv.{suffix}'
        read = assembly.third(index, turn=matrix)
      sources[name] = Source(tensor, read)
    return sources


_BIASES = {'attn_out_bias': True, 'qkv_bias': True, 'ffn_bias': True}
_GEMMA = {'rope_pairs': 'half', 'activation': 'gelu_tanh'}

FAMILIES = {
  # Trained with half pairs; the converter permutes queries and keys.
  'llama': Family({'rope_pairs': 'interleaved'}),
  'gpt2': Family(
    {
      'rope_pairs': 'half',
      'norm': 'layer',
      'gated': False,
      'activation': 'gelu_tanh',
    }
    | _BIASES,
    fused=True,
  ),
  'gptneox': Family(
    {
      'rope_pairs': 'half',
      'norm': 'layer',
      'gated': False,
      'activation': 'gelu',
    }
    | _BIASES,
    fused=True,
  ),
  'qwen2': Family({'rope_pairs': 'half', 'qkv_bias': True}),
  'qwen3': Family({'rope_pairs': 'half', 'qk_norm': True}),
  'gemma': Family(_GEMMA),
  'gemma2': Family(
    _GEMMA | {'post_norms': True}, window_period=2, unscaled_blocks=46
  ),
  'gemma3': Family(
    _GEMMA | {'post_norms': True, 'qk_norm': True},
    window_period=6,
    unscaled_blocks=62,
  ),
}


def find(metadata: dict[str, Any]) -> Family:
  """The family of a file by its `general.architecture`.

  Raises:
    UserError: if the architecture is not one of FAMILIES.
  """
  architecture = metadata.get('general.architecture')
  if architecture not in FAMILIES:
    raise errors.UserError(
      f'architecture {architecture!r} is not supported: '
      f'use a GGUF file of one of {", ".join(FAMILIES)}'
    )
  return FAMILIES[architecture]


def transformer_config(
  metadata: dict[str, Any],
  vocab_size: int,
  tied: bool = True,
  rope_factors: tuple[float, ...] = (),
) -> transformer.TransformerConfig:
  """The transformer's shape from a file's metadata.

  Args:
    metadata: key -> value of the file.
    vocab_size: rows of the embedding (not every file records it).
    tied: whether the embedding is also the unembedding.
    rope_factors: the file's divisors of rotary frequencies; empty if it has
      none.

  Raises:
    UserError: if a value is missing or not supported.
  """
  family = find(metadata)
  architecture = metadata['general.architecture']
  prefix = architecture + '.'

  def optional(name, default):
    return metadata.get(prefix + name, default)

  def value(name):
    if prefix + name not in metadata:
      raise errors.UserError(
        f'the GGUF file does not say {prefix + name}: convert the model again'
      )
    return metadata[prefix + name]

  layer_norm = family.fields.get('norm') == 'layer'
  d_model, n_layers = value('embedding_length'), value('block_count')
  n_heads = value('attention.head_count')
  d_head = optional('attention.key_length', d_model // n_heads)
  rotary = optional('rope.dimension_count', d_head)
  return transformer.TransformerConfig(
    n_layers=n_layers,
    d_model=d_model,
    n_heads=n_heads,
    n_kv_heads=optional('attention.head_count_kv', n_heads),
    d_head=d_head,
    d_ff=value('feed_forward_length'),
    vocab_size=vocab_size,
    # GGUF's default if the file has no value.
    rope_base=optional('rope.freq_base', 10000.0),
    rotary_dim=0 if rotary == d_head else rotary,
    rope_scaling=_scaling(optional, rope_factors),
    norm_eps=value(
      'attention.layer_norm_epsilon'
      if layer_norm
      else 'attention.layer_norm_rms_epsilon'
    ),
    attn_softcap=optional('attn_logit_softcapping', 0.0),
    final_softcap=optional('final_logit_softcapping', 0.0),
    tied=tied,
    **family.fields,
    **_family_fields(architecture, family, value, optional),
  )


def _family_fields(architecture, family, value, optional) -> dict[str, Any]:
  """Config fields that only some families read from the file."""
  d_model, n_layers = value('embedding_length'), value('block_count')
  fields = {}
  if architecture == 'gpt2':
    fields['n_positions'] = value('context_length')
  if architecture == 'gptneox':
    fields['parallel'] = bool(optional('use_parallel_residual', True))
  if architecture.startswith('gemma'):
    fields['embed_scale'] = d_model**0.5
    if n_layers == family.unscaled_blocks:
      fields['attn_scale'] = (d_model / value('attention.head_count')) ** -0.5
  if architecture == 'gemma3':
    # GGUF's default if the file has no value.
    fields['local_rope_base'] = optional('rope.freq_base_swa', 10_000.0)
  period = family.window_period
  window = optional('attention.sliding_window', 0) if period else 0
  if window:
    fields['windows'] = tuple(
      window if (i + 1) % period else 0 for i in range(n_layers)
    )
  return fields


def _scaling(optional, factors) -> transformer.RopeScaling | None:
  if factors:
    return transformer.RopeScaling('factors', factors=factors)
  kind = optional('rope.scaling.type', 'none')
  if kind == 'none':
    return None
  if kind == 'linear':
    return transformer.RopeScaling(
      'linear', optional('rope.scaling.factor', 1.0)
    )
  raise errors.UserError(
    f'rotary scaling {kind!r} is not supported: '
    'use a model whose positions are not scaled, or linearly'
  )
