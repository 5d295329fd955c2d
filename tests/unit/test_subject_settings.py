"""What a config.json says and leaves out, beside transformers' own defaults."""

import dataclasses
import json
import logging
import pathlib

import pytest

from sae_jax import errors
from sae_jax.subject import block
from sae_jax.subject.formats import families, family_defaults
from tests.support import subject_models

# Made by `python -m experiments.parity.defaults`.
_FILE = pathlib.Path(__file__).parent.parent / 'data' / 'family_defaults.json'
DEFAULTS = json.loads(_FILE.read_text())['families']
# Sizes that every file has.
SIZES = {
  'hidden_size', 'intermediate_size', 'num_hidden_layers',
  'num_attention_heads', 'vocab_size', 'n_embd', 'n_head', 'n_layer',
}  # fmt: skip
# Keys of training, of other heads, of tokens, and of how a model is run.
HARMLESS = {
  'attention_dropout', 'attn_pdrop', 'bos_token_id', 'classifier_dropout',
  'embd_pdrop', 'eos_token_id', 'hidden_dropout', 'initializer_range',
  'is_decoder', 'pad_token_id', 'pretraining_tp', 'reorder_and_upcast_attn',
  'resid_pdrop', 'summary_activation', 'summary_first_dropout',
  'summary_proj_to_labels', 'summary_type', 'summary_use_proj', 'use_cache',
}  # fmt: skip


def config_of(kind, **values):
  return families.transformer_config({'model_type': kind} | values)[0]


def sizes_of(kind):
  """transformers' default sizes, of those that we have no defaults for."""
  missing = SIZES - set(family_defaults.DEFAULTS[kind])
  return {k: v for k, v in DEFAULTS[kind].items() if k in missing}


def refused(kind, **values):
  with pytest.raises(errors.UserError) as error:
    config_of(kind, **sizes_of(kind) | values)
  return str(error.value)


@pytest.mark.parametrize('kind', families.FAMILIES)
def test_a_key_that_is_absent_has_transformers_default(kind):
  said = {k: v for k, v in DEFAULTS[kind].items() if k != 'sliding_window'}
  absent = config_of(kind, **sizes_of(kind))
  assert absent == config_of(kind, **said)
  if DEFAULTS[kind].get('sliding_window'):
    assert absent == config_of(kind, **DEFAULTS[kind])
  # transformers' config class drops the size of windows that are not used.
  if kind.startswith('qwen'):
    sizes = sizes_of(kind) | {'use_sliding_window': True}
    assert config_of(kind, **sizes).windows == (0,) * 28 + (4096,) * 4


def test_a_default_that_is_not_transformers_is_seen(monkeypatch):
  ours = family_defaults.DEFAULTS['gemma2']
  monkeypatch.setitem(ours, 'attn_logit_softcapping', 0)
  with pytest.raises(AssertionError):
    test_a_key_that_is_absent_has_transformers_default('gemma2')


def changed(value):
  if isinstance(value, bool) or value is None:
    return not value
  return 'other' if isinstance(value, str) else value * 2


@pytest.mark.parametrize('kind', families.FAMILIES)
def test_every_key_is_obeyed_refused_or_harmless(kind):
  base = config_of(kind, **DEFAULTS[kind])
  ignored = set()
  for key, value in DEFAULTS[kind].items():
    if key == 'rope_parameters':
      continue
    try:
      same = config_of(kind, **DEFAULTS[kind] | {key: changed(value)}) == base
    except errors.UserError:
      continue
    ignored |= {key} if same else set()
  if kind.startswith('qwen'):
    # The size of windows is null there, so that they are off either way.
    ignored -= {'use_sliding_window', 'max_window_layers', 'sliding_window'}
  assert ignored <= HARMLESS


OFF = {
  'gemma2': {
    'attn_logit_softcapping': None,
    'final_logit_softcapping': None,
    'sliding_window': None,
  },
  'mistral': {'sliding_window': None},
  'qwen3': {'use_sliding_window': True, 'sliding_window': None},
}


@pytest.mark.parametrize('kind', OFF)
def test_null_is_off(kind):
  config = config_of(kind, **sizes_of(kind) | OFF[kind])
  assert (config.windows, config.attn_softcap, config.final_softcap) == (
    (), 0, 0,
  )  # fmt: skip


def test_null_heads_are_derived():
  sizes = sizes_of('mistral')
  config = config_of('mistral', **sizes, num_key_value_heads=None)
  assert config.n_kv_heads == config.n_heads
  assert config_of('mistral', **sizes).n_kv_heads == 8


def test_the_first_files_of_gemma_mean_the_other_gelu():
  old = {'hidden_act': 'gelu', 'hidden_activation': None}
  config = config_of('gemma', **sizes_of('gemma') | old)
  assert config.activation == 'gelu_tanh'


LLAMA_3 = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
}


@pytest.mark.parametrize(
  'kind, values, base, kind_and_factor',
  [
    ('llama', {'rope_theta': 1e6, 'rope_parameters': {'rope_type': 'default'}},
     1e6, None),
    ('llama', {'rope_theta': 1e6, 'rope_scaling': {'type': 'linear',
     'factor': 4}}, 1e6, ('linear', 4)),
    ('llama', {'rope_parameters': {'rope_theta': 5e5}}, 5e5, None),
    ('llama', {'rope_parameters': {}}, 1e4, None),
    ('gpt_neox', {'rotary_emb_base': 2e4, 'rope_parameters': {
     'partial_rotary_factor': 0.5}}, 2e4, None),
    ('gemma3_text', {'rope_theta': 5e5, 'rope_parameters': {'full_attention':
     {'rope_type': 'linear', 'factor': 8.0}}}, 5e5, ('linear', 8)),
    ('gemma3_text', {'rope_scaling': {'rope_type': 'linear', 'factor': 8.0}},
     1e6, ('linear', 8)),
  ],
)  # fmt: skip
def test_bases_and_scalings_of_positions(kind, values, base, kind_and_factor):
  config = config_of(kind, **sizes_of(kind) | values)
  scaling = config.rope_scaling
  assert config.rope_base == base
  assert (scaling and (scaling.kind, scaling.factor)) == kind_and_factor


def test_the_length_before_stretching():
  sizes = sizes_of('llama') | {'max_position_embeddings': 4096}

  def length(inside=None, **beside):
    rope = LLAMA_3 | (inside or {})
    config = config_of('llama', **sizes, rope_scaling=rope, **beside)
    return config.rope_scaling.original_length

  name = 'original_max_position_embeddings'
  assert length({name: 1024}) == length(**{name: 1024}) == 1024
  # transformers takes the length of the model where no other is given.
  assert length() == 4096
  with pytest.raises(errors.UserError, match='which are one thing'):
    length({name: 1024}, **{name: 2048})


REFUSED = [
  ('llama', {'rope_scaling': {'type': 'linear'}},
   'config.json: rope_scaling does not say factor'),
  ('llama', {'rope_scaling': {'type': 'linear', 'factor': 'x'}},
   "says factor 'x', it must be a finite number above 0"),
  ('llama', {'rope_scaling': LLAMA_3 | {'high_freq_factor': 1.0}},
   'says high_freq_factor 1.0, it must be a finite number above 1'),
  ('llama', {'rope_theta': 1e6, 'rope_parameters': {'rope_theta': 5e5}},
   'rope_theta 500000 and config.json: rope_theta 1e+06, which are one thing'),
  ('llama', {'rope_theta': None}, 'config.json does not say rope_theta'),
  ('llama', {'rope_parameters': {'mrope_section': [1, 2]}},
   "says mrope_section [1, 2], which rotary scaling 'default' does not have"),
  ('llama', {'rope_parameters': {'factor': 2.0},
             'rope_scaling': {'type': 'linear', 'factor': 2.0}},
   'says rope_scaling'),
  ('llama', {'partial_rotary_factor': 0.5}, 'rotates 64 of 128 coordinates'),
  ('llama', {'attn_scale_floor': 8192}, 'says attn_scale_floor 8192, which '
   'the family llama does not have: use a model without it'),
  ('llama', {'attn_logit_softcapping': 50.0}, 'which the family llama does'),
  ('llama', {'sliding_window': 4096}, 'which the family llama does not have'),
  ('llama', {'embedding_multiplier': 12.0}, 'the family llama does not have'),
  ('llama', {'rope_interleaved': True}, 'the family llama does not have'),
  ('llama', {'num_hidden_layers': 2**40}, 'says num_hidden_layers '
   '1099511627776, it must be a whole number from 1 to 10,000'),
  ('llama', {'hidden_size': 48.0}, 'it must be a whole number from 1'),
  ('llama', {'hidden_size': True}, 'it must be a whole number from 1'),
  ('llama', {'rms_norm_eps': float('nan')}, 'a finite number above 0'),
  ('llama', {'attention_bias': 'x'}, 'it must be true or false'),
  ('llama', {'hidden_act': ['silu']}, 'it must be a text'),
  ('llama', {'rope_scaling': [1]}, 'it must be a mapping'),
  ('mistral', {'layer_types': ['full_attention', 'sliding_attention'] * 16},
   'which mistral has in all blocks'),
  ('qwen2', {'layer_types': ['sliding_attention'] * 32},
   'says sliding_attention, and not use_sliding_window'),
  ('gemma2', {'layer_types': ['full_attention']},
   'it must be a list of 26 values, one for each block'),
  ('gemma2', {'layer_types': ['chunked_attention'] * 26},
   "attention of the kind 'chunked_attention' is not supported"),
  ('gemma2', {'sliding_window_pattern': 6}, 'it must be 2 as elsewhere'),
  ('gemma3_text', {'rope_parameters': {'rope_theta': 1e6}},
   'which a model of two kinds of attention does not have'),
  ('gpt2', {'n_head': 12, 'num_attention_heads': 16},
   'says n_head 12 and num_attention_heads 16, which are one thing'),
]  # fmt: skip


@pytest.mark.parametrize('kind, values, message', REFUSED)
def test_what_is_not_known_is_refused(kind, values, message):
  line = refused(kind, **values)
  assert message in line
  assert '\n' not in line


def test_keys_that_are_off_and_aliases_are_accepted():
  config = config_of('llama', **sizes_of('llama'))
  off = {
    'rope_interleaved': False,
    'rope_scaling': None,
    'sliding_window': None,
    'residual_multiplier': 1.0,
    'attn_scale_floor': 0,
  }
  assert config_of('llama', **sizes_of('llama') | off) == config
  sizes = sizes_of('gpt2')
  del sizes['n_head']
  assert config_of('gpt2', **sizes, num_attention_heads=8).n_heads == 8
  # transformers would take 12 heads, whatever the model has.
  with pytest.raises(errors.UserError, match='does not say n_head'):
    config_of('gpt2', **sizes)


def test_a_context_longer_than_the_model_was_made_for_is_warned_of(caplog):
  config = dataclasses.replace(subject_models.LLAMA, context_length=1234)
  with caplog.at_level(logging.WARNING, logger='absl'):
    block.queries_of(config, 1234, None, None)
    assert not caplog.text
    for _ in range(2):
      block.queries_of(config, 1235, None, None)
  assert len(caplog.records) == 1
  assert 'of 1235 positions are longer than the 1234 that' in caplog.text


# What files of published models say beside their sizes.
PUBLISHED = {
  'SmolLM2': ('llama', {
    'is_llama_config': True, 'pretraining_tp': 1, 'rope_interleaved': False,
    'rope_scaling': None, 'rope_theta': 100_000, 'use_cache': True,
    'transformers.js_config': {'kv_cache_dtype': {'q4f16': 'float16'}},
  }, {'rope_base': 1e5}),
  'Qwen 2.5': ('qwen2', {
    'max_window_layers': 21, 'rope_theta': 1e6, 'sliding_window': 32_768,
    'use_mrope': False, 'use_sliding_window': False,
  }, {'rope_base': 1e6, 'windows': ()}),
  'Pythia, saved again': ('gpt_neox', {
    'partial_rotary_factor': 0.25, 'rope_scaling': None, 'rope_theta': 10_000,
    'rotary_emb_base': 10_000, 'rotary_pct': 0.25,
  }, {'rope_base': 1e4, 'rotary_dim': 24}),
  'Gemma 2B': ('gemma', {
    'head_dim': 256, 'hidden_act': 'gelu', 'hidden_activation': None,
    'rope_scaling': None, 'rope_theta': 10_000.0,
  }, {'activation': 'gelu_tanh'}),
  'Gemma 2': ('gemma2', {
    'cache_implementation': 'hybrid', 'hidden_act': 'gelu_pytorch_tanh',
    'attn_logit_softcapping': 50.0, 'query_pre_attn_scalar': 224,
  }, {'attn_softcap': 50}),
  'Gemma 3 270M': ('gemma3_text', {
    '_sliding_window_pattern': 6, 'rope_local_base_freq': 1e4,
    'layer_types': ['sliding_attention'] * 26, 'rope_scaling': None,
    'rope_theta': 1e6, 'use_bidirectional_attention': False,
  }, {'rope_base': 1e6, 'local_rope_base': 1e4, 'windows': (4096,) * 26}),
  'GPT-2': ('gpt2', {
    'n_ctx': 1024, 'task_specific_params': {'text-generation': {}},
  }, {'context_length': 1024}),
}  # fmt: skip


@pytest.mark.parametrize('name', PUBLISHED)
def test_files_of_published_models_are_read(name):
  kind, said, want = PUBLISHED[name]
  config = config_of(kind, **sizes_of(kind) | said)
  assert {key: getattr(config, key) for key in want} == want
