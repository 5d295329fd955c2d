"""Names of hyper-parameters and tensors of each family in GGUF files.

Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs,
the files that its converter writes, and what llama.cpp takes for a key that a
file lacks.
"""

import dataclasses
from typing import Any

from absl import logging

from sae_jax import errors
from sae_jax.subject import transformer
from sae_jax.subject.formats import assembly
from sae_jax.subject.formats import settings as settings_lib

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
    window_period: all blocks but each window_period-th have a window, unless
      the file says otherwise; 0 if the family has no windows.
    window: positions of a window, if the file does not say.
    local_rope_base: base of the wavelengths in blocks with a window, if the
      file does not say; 0 for the same as in the other blocks.
    softcaps: caps of scores and logits, if the file does not say; None if the
      family has none.
    unscaled_blocks: number of blocks of the family's 27B model, whose scores
      are scaled by d_model / n_heads and not by d_head (Gemma 2 and 3).
  """

  fields: dict[str, Any]
  fused: bool = False
  window_period: int = 0
  window: int = 0
  local_rope_base: float = 0.0
  softcaps: tuple[float, float] | None = None
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


# Keys that may have a value for each block.
_PER_BLOCK = (
  'feed_forward_length', 'attention.head_count', 'attention.head_count_kv',
)  # fmt: skip
# What begins so is no setting of the transformer.
_OTHER_KEYS = ('general.', 'tokenizer.', 'GGUF.', 'split.', 'quantize.')
_BASE = 10_000.0
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
    _GEMMA | {'post_norms': True},
    window_period=2,
    window=4096,
    softcaps=(50.0, 30.0),
    unscaled_blocks=46,
  ),
  'gemma3': Family(
    _GEMMA | {'post_norms': True, 'qk_norm': True},
    window_period=6,
    local_rope_base=10_000.0,
    softcaps=(0.0, 0.0),
    unscaled_blocks=62,
  ),
}


def find(metadata: dict[str, Any], where: str = 'the GGUF file') -> Family:
  """The family of a file by its `general.architecture`.

  Raises:
    UserError: if the architecture is not one of FAMILIES.
  """
  architecture = metadata.get('general.architecture')
  if not isinstance(architecture, str) or architecture not in FAMILIES:
    raise errors.UserError(
      f'architecture {architecture!r} of {where} is not supported: '
      f'use a GGUF file of one of {", ".join(FAMILIES)}'
    )
  return FAMILIES[architecture]


def transformer_config(
  metadata: dict[str, Any],
  vocab_size: int,
  tied: bool = True,
  rope_factors: tuple[float, ...] = (),
  where: str = 'the GGUF file',
) -> transformer.TransformerConfig:
  """The transformer's shape from a file's metadata.

  Args:
    metadata: key -> value of the file.
    vocab_size: rows of the embedding (not every file records it).
    tied: whether the embedding is also the unembedding.
    rope_factors: the file's divisors of rotary frequencies; empty if it has
      none.
    where: the file, for errors.

  Raises:
    UserError: if a value is missing, not of its kind or not supported, or a key
      that changes the model is not one of the family's.
  """
  family = find(metadata, where)
  architecture = metadata['general.architecture']
  settings = _settings(metadata, architecture, where)
  layer_norm = family.fields.get('norm') == 'layer'
  n_layers = settings.whole('block_count', most=settings_lib.MOST_BLOCKS)
  d_model = settings.whole('embedding_length')
  n_heads = settings.whole('attention.head_count')
  d_head = settings.whole('attention.key_length', max(1, d_model // n_heads))
  for key in ('value_length', 'key_length_swa', 'value_length_swa'):
    settings.same(f'attention.{key}', d_head)
  settings.same('attention.causal', True)
  # Converters write these too; no number of the model depends on them.
  settings.says(
    'vocab_size', 'use_parallel_residual', 'rope.scaling.finetuned',
    'rope.scaling.original_context_length', 'tensor_data_layout',
  )  # fmt: skip
  config = transformer.TransformerConfig(
    n_layers=n_layers,
    d_model=d_model,
    n_heads=n_heads,
    n_kv_heads=settings.whole('attention.head_count_kv', n_heads),
    d_head=d_head,
    d_ff=settings.whole('feed_forward_length'),
    vocab_size=vocab_size,
    context_length=settings.whole('context_length'),
    norm_eps=settings.number(
      'attention.layer_norm_epsilon'
      if layer_norm
      else 'attention.layer_norm_rms_epsilon',
      above=0,
      most=1,
    ),
    tied=tied,
    **_rope(settings, d_head, rope_factors),
    **_windows(settings, family, n_layers),
    **family.fields,
    **_family_fields(architecture, family, settings),
  )
  settings.refuse_unread(f'the family {architecture}')
  unread = {f'{architecture}.{k}': v for k, v in settings.unread().items()}
  # Of another family, or of this one by a damaged name.
  unread |= {
    key: value
    for key, value in metadata.items()
    if not key.startswith((f'{architecture}.', *_OTHER_KEYS))
    and settings_lib.changes_model(key)
  }
  for key, value in unread.items():
    logging.warning(
      '%s says %s %s, which is not read', where, key, str(value)[:60]
    )
  return config


def _settings(
  metadata: dict[str, Any], architecture: str, where: str
) -> settings_lib.Settings:
  """The family's settings by their keys without its name."""
  prefix = f'{architecture}.'
  values = {
    key.removeprefix(prefix): value
    for key, value in metadata.items()
    if key.startswith(prefix)
  }
  n_blocks = values.get('block_count')
  for key in _PER_BLOCK:
    of_blocks = values.get(key)
    if not isinstance(of_blocks, list):
      continue
    if len(of_blocks) != n_blocks or len(set(of_blocks)) != 1:
      raise errors.UserError(
        f'{where} says {prefix}{key} {str(of_blocks[:8])[:60]} for its '
        f'{n_blocks} blocks, which differ: use a model whose blocks are alike'
      )
    values[key] = of_blocks[0]
  return settings_lib.Settings(
    values, f'{where}: {architecture}', remedy='convert the model again'
  )


def _family_fields(architecture, family, settings) -> dict[str, Any]:
  """Config fields that only some families read from the file."""
  fields = {}
  if architecture == 'gpt2':
    fields['n_positions'] = settings.whole('context_length')
  if architecture == 'gptneox':
    fields['parallel'] = settings.flag('use_parallel_residual', True)
  if architecture.startswith('gemma'):
    d_model = settings.whole('embedding_length')
    fields['embed_scale'] = d_model**0.5
    if settings.whole('block_count') == family.unscaled_blocks:
      n_heads = settings.whole('attention.head_count')
      fields['attn_scale'] = (d_model / n_heads) ** -0.5
  if family.softcaps is not None:
    attn, final = family.softcaps
    fields['attn_softcap'] = settings.number(
      'attn_logit_softcapping', attn, null=0, least=0
    )
    fields['final_softcap'] = settings.number(
      'final_logit_softcapping', final, null=0, least=0
    )
  return fields


def _windows(settings, family, n_layers) -> dict[str, Any]:
  window = settings.whole(
    'attention.sliding_window', family.window, null=0, least=0
  )
  if not family.window_period:
    # No longer than any context, it changes nothing.
    if window and window < settings.whole('context_length'):
      raise errors.UserError(
        f'{settings.where}: sliding windows of {window} are not supported in '
        'this family: use the model as safetensors'
      )
    return {}
  key = 'attention.sliding_window_pattern'
  if isinstance(settings.values.get(key), list):
    slides = settings.entries(key, bool, n_layers)
  else:
    period = settings.whole(key, family.window_period, least=0)
    slides = [not period or (i + 1) % period for i in range(n_layers)]
  windows = tuple(window if slide else 0 for slide in slides)
  base = settings.number('rope.freq_base', _BASE, least=1, most=1e15)
  local = settings.number(
    'rope.freq_base_swa', family.local_rope_base or base, least=1, most=1e15
  )
  fields = {}
  if family.local_rope_base or local != base:
    fields['local_rope_base'] = local
    if not family.local_rope_base and _factor(settings) != 1:
      raise errors.UserError(
        f'{settings.where}: rotary scaling beside rope.freq_base_swa {local:g} '
        'is not supported: use a model without one of them'
      )
  return fields | ({'windows': windows} if any(windows) else {})


def _rope(settings, d_head, factors) -> dict[str, Any]:
  """Config fields of rotary positions, with GGUF's defaults."""
  rotary = settings.whole('rope.dimension_count', d_head, most=d_head)
  settings.same('rope.dimension_count_swa', rotary)
  factor = _factor(settings)
  scaling = None
  if factors:
    if len(factors) != rotary // 2 or not all(0 < x < 1e9 for x in factors):
      raise errors.UserError(
        f'{settings.where}: rope_freqs.weight has {len(factors)} factors from '
        f'{min(factors):g} to {max(factors):g}, it must have {rotary // 2} '
        'positive ones: convert the model again'
      )
    scaling = transformer.RopeScaling(
      'factors', factors=tuple(factor * x for x in factors)
    )
  elif factor != 1:
    scaling = transformer.RopeScaling('linear', factor)
  return {
    'rope_base': settings.number('rope.freq_base', _BASE, least=1, most=1e15),
    'rotary_dim': 0 if rotary == d_head else rotary,
    'rope_scaling': scaling,
  }


def _factor(settings) -> float:
  """The divisor of all rotary frequencies; without a type it is linear."""
  kind = settings.text('rope.scaling.type', 'linear')
  # The key of files before August 2023.
  old = settings.number('rope.scale_linear', 1.0, least=0)
  factor = settings.number('rope.scaling.factor', old, least=0)
  if kind not in ('none', 'linear'):
    raise errors.UserError(
      f'{settings.where}: rotary scaling {kind!r} is not supported: '
      'use a model whose positions are not scaled, or linearly'
    )
  return factor if factor and kind == 'linear' else 1.0
