"""Small random models of every family, drawn alike with torch and without.

A tensor's values follow from its name, so that tests can write the same files
and compare with what transformers made of them (`compare --golden`).
"""

import dataclasses
from typing import Any
import zlib

import numpy as np

from sae_jax.subject import transformer

# Tensors drawn with this deviation make logits and attention far from flat.
_DEVIATION = 0.2


@dataclasses.dataclass(frozen=True)
class Model:
  """One random model.

  Attributes:
    name: what is odd about it.
    kind: its config class and model class in transformers.
    settings: arguments of the config.
    shards: files its weights are split over.
    golden: whether tests compare with some of its numbers.
  """

  name: str
  kind: tuple[str, str]
  settings: dict[str, Any]
  shards: int = 1
  golden: bool = False


_LLAMA = {
  'vocab_size': 97,
  'hidden_size': 48,
  'intermediate_size': 80,
  'num_hidden_layers': 4,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
}
_NEOX = {
  'vocab_size': 97,
  'hidden_size': 48,
  'intermediate_size': 80,
  'num_hidden_layers': 4,
  'num_attention_heads': 3,
}
_GPT2 = {
  'vocab_size': 97,
  'n_embd': 48,
  'n_layer': 4,
  'n_head': 4,
  'n_positions': 64,
}
_ROPE_3 = {
  'rope_type': 'llama3',
  'rope_theta': 500.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
_GEMMA = _LLAMA | {'head_dim': 16, 'query_pre_attn_scalar': 24}


def _kind(family: str) -> tuple[str, str]:
  return f'{family}Config', f'{family}ForCausalLM'


def models() -> list[Model]:
  """The models that are compared."""
  llama, neox = _kind('Llama'), _kind('GPTNeoX')
  gpt2 = ('GPT2Config', 'GPT2LMHeadModel')
  qwen2, qwen3 = _kind('Qwen2'), _kind('Qwen3')
  gemma2 = _kind('Gemma2')
  gemma3 = ('Gemma3TextConfig', 'Gemma3ForCausalLM')
  return [
    Model('gpt2', gpt2, _GPT2, golden=True),
    Model(
      'gpt2 untied, scores by block, relu',
      gpt2,
      _GPT2
      | {
        'tie_word_embeddings': False,
        'scale_attn_by_inverse_layer_idx': True,
        'activation_function': 'relu',
        'n_inner': 60,
      },
    ),
    Model('neox, a quarter rotary (Pythia)', neox, _NEOX, golden=True),
    Model(
      'neox sequential, half rotary, tanh gelu',
      neox,
      _NEOX
      | {
        'use_parallel_residual': False,
        'rotary_pct': 0.5,
        'hidden_act': 'gelu_new',
      },
    ),
    Model(
      'neox tied, no attention bias',
      neox,
      _NEOX | {'attention_bias': False, 'tie_word_embeddings': True},
    ),
    Model(
      'llama, one head a group',
      llama,
      _LLAMA | {'num_key_value_heads': 6},
    ),
    Model(
      'llama grouped, tied (SmolLM2), 3 files',
      llama,
      _LLAMA | {'tie_word_embeddings': True},
      shards=3,
    ),
    Model(
      'llama 3 stretched positions',
      llama,
      _LLAMA | {'rope_parameters': _ROPE_3},
      golden=True,
    ),
    Model(
      'llama biases, wide heads, linear stretch',
      llama,
      _LLAMA
      | {
        'attention_bias': True,
        'mlp_bias': True,
        'head_dim': 10,
        'num_key_value_heads': 1,
        'rope_parameters': {
          'rope_type': 'linear',
          'factor': 3.0,
          'rope_theta': 1000.0,
        },
      },
      golden=True,
    ),
    Model(
      'mistral, a window',
      _kind('Mistral'),
      _LLAMA | {'sliding_window': 7},
      golden=True,
    ),
    Model(
      'mistral, no window', _kind('Mistral'), _LLAMA | {'sliding_window': None}
    ),
    Model('qwen2', qwen2, _LLAMA | {'tie_word_embeddings': True}, golden=True),
    Model(
      'qwen2, windows from block 2',
      qwen2,
      _LLAMA
      | {
        'use_sliding_window': True,
        'sliding_window': 5,
        'max_window_layers': 2,
      },
    ),
    Model('qwen3, wide heads', qwen3, _LLAMA | {'head_dim': 16}, golden=True),
    Model(
      'qwen3 biases, tied, windows',
      qwen3,
      _LLAMA
      | {
        'head_dim': 8,
        'attention_bias': True,
        'tie_word_embeddings': True,
        'use_sliding_window': True,
        'sliding_window': 9,
        'max_window_layers': 1,
      },
    ),
    Model('gemma', _kind('Gemma'), _LLAMA | {'head_dim': 16}),
    Model(
      'gemma 2, caps and windows',
      gemma2,
      _GEMMA
      | {
        'sliding_window': 6,
        'attn_logit_softcapping': 3.0,
        'final_logit_softcapping': 5.0,
      },
      golden=True,
    ),
    Model(
      'gemma 2, no caps, 2 files',
      gemma2,
      _GEMMA
      | {
        'sliding_window': 6,
        'attn_logit_softcapping': None,
        'final_logit_softcapping': None,
      },
      shards=2,
    ),
    Model(
      'gemma 3, window of 5 in 6 blocks',
      gemma3,
      _GEMMA | {'num_hidden_layers': 7, 'sliding_window': 6},
      golden=True,
    ),
    Model(
      'gemma 3, stretched, other layers, cap',
      gemma3,
      _GEMMA
      | {
        'sliding_window': 5,
        'layer_types': [
          'full_attention',
          'sliding_attention',
          'sliding_attention',
          'full_attention',
        ],
        'final_logit_softcapping': 4.0,
        'rope_parameters': {
          'full_attention': {
            'rope_type': 'linear',
            'factor': 8.0,
            'rope_theta': 2000.0,
          },
          'sliding_attention': {'rope_type': 'default', 'rope_theta': 100.0},
        },
      },
    ),
  ]


def draw(name: str, shape: tuple[int, ...], model_type: str) -> np.ndarray:
  """The values of a tensor: normal, around one for the weights of norms.

  Around zero in Gemma, which adds one to them.
  """
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  values = _DEVIATION * rng.standard_normal(shape, np.float32)
  norm = name.endswith('.weight') and len(shape) == 1
  return values + np.float32(norm and not model_type.startswith('gemma'))


def tokens(model: Model, n_sequences: int = 2, n_positions: int = 40):
  """The tokens that every model reads, int64 [n_sequences, n_positions]."""
  rng = np.random.default_rng(1)
  return rng.integers(
    0, model.settings['vocab_size'], (n_sequences, n_positions)
  )


def sample(x: np.ndarray) -> list[float]:
  """Six numbers from all over an array."""
  flat = np.asarray(x).reshape(-1)
  places = (np.linspace(0.06, 0.99, 6) * flat.size).astype(int)
  return [round(float(value), 6) for value in flat[places]]


def defects(
  config: transformer.TransformerConfig,
) -> dict[str, dict[str, Any]]:
  """Changes that each set one switch of this model wrong: the controls."""
  other = {'silu': 'gelu', 'gelu': 'silu', 'gelu_tanh': 'silu', 'relu': 'gelu'}
  changes = {'activation': {'activation': other[config.activation]}}
  if not config.n_positions:
    changes['rope_base'] = {'rope_base': 1.5 * config.rope_base}
    if config.rotary_dim not in (0, config.d_head):
      changes['rotary_dim'] = {'rotary_dim': 0}
    if config.rope_scaling is not None:
      changes['rope_scaling'] = {'rope_scaling': None}
    if config.local_rope_base:
      changes['local_rope_base'] = {'local_rope_base': 0.0}
  if config.windows:
    changes['windows'] = {'windows': ()}
    longer = tuple(w + 1 if w else 0 for w in config.windows)
    changes['windows + 1'] = {'windows': longer}
  if config.attn_scale:
    changes['attn_scale'] = {'attn_scale': 0.0}
  if config.attn_scale_by_block:
    changes['attn_scale_by_block'] = {'attn_scale_by_block': False}
  for name in ('attn_softcap', 'final_softcap'):
    if getattr(config, name):
      changes[name] = {name: 0.0}
  if config.embed_scale != 1:
    changes['embed_scale'] = {'embed_scale': 1.0}
  if config.norm == 'layer':
    changes['parallel'] = {'parallel': not config.parallel}
    changes['norm'] = {'norm': 'rms'}
  if config.qk_norm:
    changes['qk_norm'] = {'qk_norm': False}
  if config.post_norms:
    changes['post_norms'] = {'post_norms': False}
  if not config.windows and config.n_kv_heads < config.n_heads:
    changes['windows'] = {'windows': (20,) * config.n_layers}
  return changes
