"""Model families as transformers' config.json describes them.

A family maps the keys of the file to a `TransformerConfig` and names the
tensors of the safetensors files. If a file lacks a key, transformers' default
for the family is used (release 5.24).
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from sae_jax import errors
from sae_jax.subject import transformer
from sae_jax.subject.formats import assembly, family_tensors

Source = assembly.Source

_ACTIVATIONS = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_fast': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'relu': 'relu',
}


@dataclasses.dataclass(frozen=True)
class Family:
  """One `model_type`.

  Attributes:
    config: a config.json with defaults filled in -> the transformer's shape.
    sources: the shape -> a dict of parameter -> where it is stored; a block's
      parameter has the prefix 'blocks.'.
    defaults: the defaults of keys that a file may lack.
  """

  config: Callable[[dict[str, Any]], transformer.TransformerConfig]
  sources: Callable[[transformer.TransformerConfig], dict[str, Source]]
  defaults: dict[str, Any]


def transformer_config(
  settings: dict[str, Any],
) -> tuple[transformer.TransformerConfig, dict[str, Source]]:
  """The transformer's shape and the sources of its parameters.

  Args:
    settings: a parsed config.json.

  Raises:
    UserError: if the family or a value is not supported, or a value is missing.
  """
  kind = settings.get('model_type')
  if kind == 'gemma3':
    # A model with vision: this is its language model.
    text = settings.get('text_config', {})
    tied = settings.get('tie_word_embeddings', True)
    settings = {'tie_word_embeddings': tied} | text
    kind = 'gemma3_text'
  if kind not in FAMILIES:
    raise errors.UserError(
      f'model_type {kind!r} is not supported: use a model of one of '
      f'{", ".join(FAMILIES)}'
    )
  family = FAMILIES[kind]
  given = {key: value for key, value in settings.items() if value is not None}
  config = family.config(_Settings(family.defaults | given))
  return config, family.sources(config)


class _Settings(dict):
  """Settings; looking up a missing key is a UserError."""

  def __missing__(self, key):
    raise errors.UserError(
      f'config.json does not say {key}: download the model again'
    )


def _activation(name: str) -> str:
  if name not in _ACTIVATIONS:
    raise errors.UserError(
      f'activation {name!r} is not supported: use a model with one of '
      f'{", ".join(_ACTIVATIONS)}'
    )
  return _ACTIVATIONS[name]


def _scaling(rope: dict[str, Any]) -> transformer.RopeScaling | None:
  """The scaling in `rope_parameters`, or in `rope_scaling` of older files."""
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind == 'default':
    return None
  if kind == 'linear':
    return transformer.RopeScaling('linear', rope['factor'])
  if kind == 'llama3':
    return transformer.RopeScaling(
      'llama3',
      rope['factor'],
      rope['low_freq_factor'],
      rope['high_freq_factor'],
      rope['original_max_position_embeddings'],
    )
  raise errors.UserError(
    f'rotary scaling {kind!r} is not supported: use a model with default, '
    'linear or llama3 positions'
  )


def _rope(settings: _Settings, base: str = 'rope_theta') -> dict[str, Any]:
  """Config fields of rotary positions; `base` is the key in older files."""
  rope = settings.get('rope_parameters')
  if rope is None:
    rope = settings.get('rope_scaling') or {}
    rope = {'rope_theta': settings.get(base, 10_000.0)} | rope
  return {
    'rope_base': float(rope.get('rope_theta', 10_000.0)),
    'rope_scaling': _scaling(rope),
    'rope_pairs': 'half',
  }


def _windows(settings: _Settings, n_layers: int, sliding) -> tuple[int, ...]:
  """Each block's window; `sliding(i)` is whether block i has one by default."""
  window = settings.get('sliding_window') or 0
  kinds = settings.get('layer_types') or [
    'sliding_attention' if sliding(i) else 'full_attention'
    for i in range(n_layers)
  ]
  unknown = set(kinds) - {'sliding_attention', 'full_attention'}
  if unknown:
    raise errors.UserError(
      f'attention of the kind {min(unknown)!r} is not supported: use a model '
      'of full_attention and sliding_attention'
    )
  windows = tuple(window * (kind == 'sliding_attention') for kind in kinds)
  return windows if any(windows) else ()


def _common(settings: _Settings) -> dict[str, Any]:
  """Config fields whose keys are the same in all families but GPT-2."""
  n_heads = settings['num_attention_heads']
  d_model = settings['hidden_size']
  return {
    'n_layers': settings['num_hidden_layers'],
    'd_model': d_model,
    'n_heads': n_heads,
    'n_kv_heads': settings.get('num_key_value_heads', n_heads),
    'd_head': settings.get('head_dim') or d_model // n_heads,
    'd_ff': settings['intermediate_size'],
    'vocab_size': settings['vocab_size'],
    'tied': settings['tie_word_embeddings'],
  }


def _llama(settings: _Settings) -> transformer.TransformerConfig:
  return transformer.TransformerConfig(
    **_common(settings),
    **_rope(settings),
    norm_eps=settings['rms_norm_eps'],
    activation=_activation(settings['hidden_act']),
    qkv_bias=settings.get('attention_bias', False),
    attn_out_bias=settings.get('attention_bias', False),
    ffn_bias=settings.get('mlp_bias', False),
  )


def _mistral(settings: _Settings) -> transformer.TransformerConfig:
  config = _llama(settings)
  windows = _windows(settings, config.n_layers, lambda i: True)
  return dataclasses.replace(config, windows=windows)


def _qwen(settings: _Settings) -> transformer.TransformerConfig:
  config = _llama(settings)
  windows = ()
  if settings['use_sliding_window']:
    windows = _windows(
      settings, config.n_layers, lambda i: i >= settings['max_window_layers']
    )
  if settings['model_type'] == 'qwen2':
    # Qwen2 always has these biases; the file does not say so.
    return dataclasses.replace(config, qkv_bias=True, windows=windows)
  return dataclasses.replace(config, qk_norm=True, windows=windows)


def _gemma(settings: _Settings) -> transformer.TransformerConfig:
  bias = settings['attention_bias']
  if settings.get('use_bidirectional_attention'):
    raise errors.UserError(
      'use_bidirectional_attention is not supported: use a causal model'
    )
  kind = settings['model_type']
  d_model = settings['hidden_size']
  config = transformer.TransformerConfig(
    **_common(settings),
    **(_gemma_3_rope(settings) if kind == 'gemma3_text' else _rope(settings)),
    norm_eps=settings['rms_norm_eps'],
    activation=_activation(
      settings.get('hidden_activation') or settings['hidden_act']
    ),
    qkv_bias=bias,
    attn_out_bias=bias,
    embed_scale=d_model**0.5,
  )
  if kind == 'gemma':
    return config
  period = settings['sliding_window_pattern']
  return dataclasses.replace(
    config,
    post_norms=True,
    qk_norm=kind == 'gemma3_text',
    windows=_windows(
      settings, config.n_layers, lambda i: bool((i + 1) % period)
    ),
    attn_scale=settings['query_pre_attn_scalar'] ** -0.5,
    attn_softcap=float(settings.get('attn_logit_softcapping') or 0),
    final_softcap=float(settings.get('final_logit_softcapping') or 0),
  )


def _gemma_3_rope(settings: _Settings) -> dict[str, Any]:
  """Config fields of rotary positions, of full and of sliding attention."""
  ropes = settings.get('rope_parameters')
  if ropes is None:
    ropes = {
      'full_attention': {'rope_theta': settings.get('rope_theta', 1e6)}
      | (settings.get('rope_scaling') or {}),
      'sliding_attention': {
        'rope_theta': settings.get('rope_local_base_freq', 1e4)
      },
    }
  local = ropes.get('sliding_attention') or {}
  if _scaling(local) is not None:
    raise errors.UserError(
      'rotary scaling of sliding_attention is not supported: use a model '
      'that scales full_attention alone'
    )
  full = {'rope_theta': 1e6} | (ropes.get('full_attention') or {})
  return {
    'rope_base': float(full['rope_theta']),
    'rope_scaling': _scaling(full),
    'local_rope_base': float(local.get('rope_theta', 1e4)),
    'rope_pairs': 'half',
  }


def _neox(settings: _Settings) -> transformer.TransformerConfig:
  rope = settings.get('rope_parameters') or {}
  portion = rope.get('partial_rotary_factor', settings['rotary_pct'])
  common = _common(settings)
  return transformer.TransformerConfig(
    **common,
    **_rope(settings, 'rotary_emb_base'),
    rotary_dim=int(common['d_head'] * portion),
    norm='layer',
    norm_eps=settings['layer_norm_eps'],
    parallel=settings['use_parallel_residual'],
    qkv_bias=settings['attention_bias'],
    attn_out_bias=settings['attention_bias'],
    ffn_bias=True,
    gated=False,
    activation=_activation(settings['hidden_act']),
  )


def _gpt2(settings: _Settings) -> transformer.TransformerConfig:
  n_heads, d_model = settings['n_head'], settings['n_embd']
  if settings.get('add_cross_attention'):
    raise errors.UserError(
      'add_cross_attention is not supported: use a decoder-only model'
    )
  return transformer.TransformerConfig(
    n_layers=settings['n_layer'],
    d_model=d_model,
    n_heads=n_heads,
    n_kv_heads=n_heads,
    d_head=d_model // n_heads,
    d_ff=settings.get('n_inner', 4 * d_model),
    vocab_size=settings['vocab_size'],
    n_positions=settings['n_positions'],
    rope_base=0.0,
    rope_pairs='half',
    norm='layer',
    norm_eps=settings['layer_norm_epsilon'],
    qkv_bias=True,
    attn_out_bias=True,
    ffn_bias=True,
    gated=False,
    activation=_activation(settings['activation_function']),
    attn_scale=0.0 if settings['scale_attn_weights'] else 1.0,
    attn_scale_by_block=settings['scale_attn_by_inverse_layer_idx'],
    tied=settings['tie_word_embeddings'],
  )


_QWEN = {
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-6,
  'use_sliding_window': False,
  'sliding_window': 4096,
  'max_window_layers': 28,
  'tie_word_embeddings': False,
  'vocab_size': 151_936,
}
_GEMMA = {
  'rms_norm_eps': 1e-6,
  'attention_bias': False,
  'tie_word_embeddings': True,
  'query_pre_attn_scalar': 256,
  'head_dim': 256,
}

FAMILIES = {
  'gpt2': Family(
    _gpt2,
    family_tensors.gpt2,
    {
      'n_layer': 12,
      'n_head': 12,
      'n_embd': 768,
      'n_positions': 1024,
      'vocab_size': 50_257,
      'layer_norm_epsilon': 1e-5,
      'activation_function': 'gelu_new',
      'scale_attn_weights': True,
      'scale_attn_by_inverse_layer_idx': False,
      'tie_word_embeddings': True,
    },
  ),
  'gpt_neox': Family(
    _neox,
    family_tensors.neox,
    {
      'hidden_act': 'gelu',
      'layer_norm_eps': 1e-5,
      'rotary_pct': 0.25,
      'use_parallel_residual': True,
      'attention_bias': True,
      'tie_word_embeddings': False,
    },
  ),
  'llama': Family(
    _llama,
    family_tensors.llama,
    {
      'hidden_act': 'silu',
      'rms_norm_eps': 1e-6,
      'tie_word_embeddings': False,
    },
  ),
  'mistral': Family(
    _mistral,
    family_tensors.llama,
    {
      'hidden_act': 'silu',
      'rms_norm_eps': 1e-6,
      'num_key_value_heads': 8,
      'tie_word_embeddings': False,
    },
  ),
  'qwen2': Family(_qwen, family_tensors.llama, _QWEN),
  'qwen3': Family(_qwen, family_tensors.llama, _QWEN | {'head_dim': 128}),
  'gemma': Family(
    _gemma, family_tensors.gemma, _GEMMA | {'hidden_act': 'gelu_pytorch_tanh'}
  ),
  'gemma2': Family(
    _gemma,
    family_tensors.gemma,
    _GEMMA
    | {
      'num_attention_heads': 8,
      'num_key_value_heads': 4,
      'hidden_activation': 'gelu_pytorch_tanh',
      'vocab_size': 256_000,
      'sliding_window': 4096,
      'sliding_window_pattern': 2,
    },
  ),
  'gemma3_text': Family(
    _gemma,
    family_tensors.gemma,
    _GEMMA
    | {
      'num_attention_heads': 8,
      'num_key_value_heads': 4,
      'hidden_activation': 'gelu_pytorch_tanh',
      'vocab_size': 262_208,
      'sliding_window': 4096,
      'sliding_window_pattern': 6,
    },
  ),
}
