"""Model families as transformers' config.json describes them.

A family maps the keys of the file to a `TransformerConfig` and names the
tensors of the safetensors files. A key that a file lacks has transformers'
default for the family (release 5.24), and one that is null is off; sizes that
transformers always writes must be there.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from sae_jax import errors
from sae_jax.subject import transformer
from sae_jax.subject.formats import (
  assembly,
  family_defaults,
  family_positions,
  family_tensors,
)
from sae_jax.subject.formats import settings as settings_lib

Settings = settings_lib.Settings
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
    config: a config.json's settings -> the transformer's shape.
    sources: the shape -> a dict of parameter -> where it is stored; a block's
      parameter has the prefix 'blocks.'.
    defaults: the defaults of keys that a file may lack.
    aliases: other names of keys -> the keys, as transformers takes them.
  """

  config: Callable[[Settings], transformer.TransformerConfig]
  sources: Callable[[transformer.TransformerConfig], dict[str, Source]]
  defaults: dict[str, Any]
  aliases: dict[str, str] = dataclasses.field(default_factory=dict)


def transformer_config(
  values: dict[str, Any], where: str = 'config.json'
) -> tuple[transformer.TransformerConfig, dict[str, Source]]:
  """The transformer's shape and the sources of its parameters.

  Args:
    values: a parsed config.json.
    where: the file, for errors.

  Raises:
    UserError: if the family or a value is not supported, a value is missing or
      not of its kind, or a key that changes the model is not one of the
      family's.
  """
  kind = values.get('model_type')
  if kind == 'gemma3':
    # A model with vision: this is its language model.
    tied = {'tie_word_embeddings': values.get('tie_word_embeddings', True)}
    text = Settings(values, where).group('text_config')
    values = tied | (text.values if text else {})
    kind = 'gemma3_text'
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise errors.UserError(
      f'model_type {kind!r} of {where} is not supported: use a model of one of '
      f'{", ".join(FAMILIES)}'
    )
  family = FAMILIES[kind]
  settings = Settings(
    _without_aliases(values, family, where) | {'model_type': kind},
    where,
    family.defaults,
  )
  config = family.config(settings)
  settings.refuse_unread(f'the family {kind}')
  return config, family.sources(config)


def _without_aliases(
  values: dict[str, Any], family: Family, where: str
) -> dict[str, Any]:
  renamed = {k: v for k, v in values.items() if k not in family.aliases}
  for alias, key in family.aliases.items():
    if alias not in values:
      continue
    value = values[alias]
    if renamed.setdefault(key, value) != value:
      raise errors.UserError(
        f'{where} says {key} {renamed[key]!r} and {alias} {value!r}, which are '
        'one thing: remove the wrong one'
      )
  return renamed


def _activation(settings: Settings, key: str) -> str:
  name = settings.text(key, null=settings.defaults[key])
  if name not in _ACTIVATIONS:
    raise errors.UserError(
      f'activation {name!r} of {settings.where} is not supported: use a model '
      f'with one of {", ".join(_ACTIVATIONS)}'
    )
  return _ACTIVATIONS[name]


def _common(settings: Settings) -> dict[str, Any]:
  """Config fields whose keys are the same in all families but GPT-2."""
  n_heads = settings.whole('num_attention_heads')
  d_model = settings.whole('hidden_size')
  return {
    'n_layers': settings.whole(
      'num_hidden_layers', most=settings_lib.MOST_BLOCKS
    ),
    'd_model': d_model,
    'n_heads': n_heads,
    'n_kv_heads': settings.whole('num_key_value_heads', null=n_heads),
    'd_head': settings.whole('head_dim', null=max(1, d_model // n_heads)),
    'd_ff': settings.whole('intermediate_size'),
    'vocab_size': settings.whole('vocab_size'),
    'tied': settings.flag('tie_word_embeddings'),
    'context_length': settings.whole('max_position_embeddings'),
  }


def _llama(settings: Settings) -> transformer.TransformerConfig:
  bias = settings.flag('attention_bias', False)
  common = _common(settings)
  family_positions.rotary_dim(settings, common['d_head'])
  return transformer.TransformerConfig(
    **common,
    **family_positions.rope(settings),
    norm_eps=settings.number('rms_norm_eps', above=0, most=1),
    activation=_activation(settings, 'hidden_act'),
    qkv_bias=bias,
    attn_out_bias=bias,
    ffn_bias=settings.flag('mlp_bias', False),
  )


def _mistral(settings: Settings) -> transformer.TransformerConfig:
  config = _llama(settings)
  windows = family_positions.windows(settings, config.n_layers, lambda i: True)
  if len(set(windows)) > 1:
    raise errors.UserError(
      f'{settings.where} says full_attention and a sliding_window, which '
      'mistral has in all blocks: download the model again'
    )
  return dataclasses.replace(config, windows=windows)


def _qwen(settings: Settings) -> transformer.TransformerConfig:
  config = _llama(settings)
  n_layers = config.n_layers
  if settings.flag('use_sliding_window'):
    first = settings.whole('max_window_layers', least=0)
    windows = family_positions.windows(settings, n_layers, lambda i: i >= first)
  else:
    windows = family_positions.no_windows(settings, n_layers)
  if settings.text('model_type') == 'qwen2':
    # Qwen2 always has these biases; the file does not say so.
    return dataclasses.replace(config, qkv_bias=True, windows=windows)
  return dataclasses.replace(config, qk_norm=True, windows=windows)


def _gemma(settings: Settings) -> transformer.TransformerConfig:
  bias = settings.flag('attention_bias')
  if settings.flag('use_bidirectional_attention', False):
    raise errors.UserError(
      f'use_bidirectional_attention of {settings.where} is not supported: use '
      'a causal model'
    )
  kind = settings.text('model_type')
  common = _common(settings)
  if kind == 'gemma3_text':
    rotary = family_positions.gemma_3_rope(settings)
  else:
    family_positions.rotary_dim(settings, common['d_head'])
    rotary = family_positions.rope(settings)
  config = transformer.TransformerConfig(
    **common,
    **rotary,
    norm_eps=settings.number('rms_norm_eps', above=0, most=1),
    activation=_gemma_activation(settings),
    qkv_bias=bias,
    attn_out_bias=bias,
    embed_scale=common['d_model'] ** 0.5,
  )
  if kind == 'gemma':
    return config
  period = settings.defaults['sliding_window_pattern']
  if kind == 'gemma2':
    settings.same('sliding_window_pattern', period)
  else:
    period = settings.whole('sliding_window_pattern')
  if settings.says('layer_types'):
    # A list of all blocks comes before it.
    settings.says('_sliding_window_pattern')
  else:
    settings.same('_sliding_window_pattern', period)
  windows = family_positions.windows(
    settings, config.n_layers, lambda i: bool((i + 1) % period)
  )
  return dataclasses.replace(
    config,
    post_norms=True,
    qk_norm=kind == 'gemma3_text',
    windows=windows,
    attn_scale=settings.number('query_pre_attn_scalar', above=0) ** -0.5,
    attn_softcap=settings.number('attn_logit_softcapping', null=0, least=0),
    final_softcap=settings.number('final_logit_softcapping', null=0, least=0),
  )


def _gemma_activation(settings: Settings) -> str:
  old = 'hidden_act' in settings.defaults
  if settings.says('hidden_activation') or not old:
    return _activation(settings, 'hidden_activation')
  # The first files of Gemma say 'gelu' and mean the other one.
  exact = settings.text('hidden_act', null='gelu') == 'gelu'
  return 'gelu_tanh' if exact else _activation(settings, 'hidden_act')


def _neox(settings: Settings) -> transformer.TransformerConfig:
  common = _common(settings)
  bias = settings.flag('attention_bias')
  return transformer.TransformerConfig(
    **common,
    **family_positions.rope(settings, 'rotary_emb_base'),
    rotary_dim=family_positions.rotary_dim(
      settings, common['d_head'], 'rotary_pct'
    ),
    norm='layer',
    norm_eps=settings.number('layer_norm_eps', above=0, most=1),
    parallel=settings.flag('use_parallel_residual'),
    qkv_bias=bias,
    attn_out_bias=bias,
    ffn_bias=True,
    gated=False,
    activation=_activation(settings, 'hidden_act'),
  )


def _gpt2(settings: Settings) -> transformer.TransformerConfig:
  n_heads, d_model = settings.whole('n_head'), settings.whole('n_embd')
  if settings.flag('add_cross_attention', False):
    raise errors.UserError(
      f'add_cross_attention of {settings.where} is not supported: use a '
      'decoder-only model'
    )
  n_positions = settings.whole('n_positions')
  return transformer.TransformerConfig(
    n_layers=settings.whole('n_layer', most=settings_lib.MOST_BLOCKS),
    d_model=d_model,
    n_heads=n_heads,
    n_kv_heads=n_heads,
    d_head=max(1, d_model // n_heads),
    d_ff=settings.whole('n_inner', null=4 * d_model),
    vocab_size=settings.whole('vocab_size'),
    context_length=n_positions,
    n_positions=n_positions,
    rope_base=0.0,
    rope_pairs='half',
    norm='layer',
    norm_eps=settings.number('layer_norm_epsilon', above=0, most=1),
    qkv_bias=True,
    attn_out_bias=True,
    ffn_bias=True,
    gated=False,
    activation=_activation(settings, 'activation_function'),
    attn_scale=0.0 if settings.flag('scale_attn_weights') else 1.0,
    attn_scale_by_block=settings.flag('scale_attn_by_inverse_layer_idx'),
    tied=settings.flag('tie_word_embeddings'),
  )


_FAMILIES = {
  'gpt2': (_gpt2, family_tensors.gpt2),
  'gpt_neox': (_neox, family_tensors.neox),
  'llama': (_llama, family_tensors.llama),
  'mistral': (_mistral, family_tensors.llama),
  'qwen2': (_qwen, family_tensors.llama),
  'qwen3': (_qwen, family_tensors.llama),
  'gemma': (_gemma, family_tensors.gemma),
  'gemma2': (_gemma, family_tensors.gemma),
  'gemma3_text': (_gemma, family_tensors.gemma),
}
_ALIASES = {
  'gpt2': {
    'hidden_size': 'n_embd',
    'max_position_embeddings': 'n_positions',
    'num_attention_heads': 'n_head',
    'num_hidden_layers': 'n_layer',
  }
}
FAMILIES = {
  name: Family(
    config, sources, family_defaults.DEFAULTS[name], _ALIASES.get(name, {})
  )
  for name, (config, sources) in _FAMILIES.items()
}
