"""What a GGUF file's metadata says and leaves out, beside llama.cpp's rules."""

import copy
import dataclasses
import logging
import pathlib
import shutil

import jax
import numpy as np
import pytest

from sae_jax import errors, subject
from sae_jax.subject import transformer
from sae_jax.subject.formats import folder, gguf_families
from tests.support import gguf_models, hf_folder

LLAMA = 'llama 3 stretched positions'
GEMMA_2 = 'gemma 2, caps and windows'
GEMMA_3 = 'gemma 3, window of 5 in 6 blocks'
forward = jax.jit(transformer.forward, static_argnums=0)


def config_of(architecture, vocab_size=256_000, factors=(), **more):
  """The shape of a small model with these keys; `__` stands for a dot."""
  values = {
    'block_count': 12,
    'context_length': 4096,
    'embedding_length': 64,
    'feed_forward_length': 96,
    'attention.head_count': 4,
    'attention.layer_norm_rms_epsilon': 1e-6,
    'attention.layer_norm_epsilon': 1e-6,
  } | {key.replace('__', '.'): value for key, value in more.items()}
  prefixed = {f'{architecture}.{k}': v for k, v in values.items()}
  return gguf_families.transformer_config(
    {'general.architecture': architecture} | prefixed,
    vocab_size,
    rope_factors=factors,
  )


def changed(name, **changes):
  """A golden record with other settings; null is None, absent is ...."""
  record = copy.deepcopy(hf_folder.golden()[name])
  for key, value in changes.items():
    if value is ...:
      record['config'].pop(key)
    else:
      record['config'][key] = value
  return record


LINEAR = {'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 500.0}
WAYS = {
  'caps absent': (
    GEMMA_2, {'attn_logit_softcapping': ..., 'final_logit_softcapping': ...},
  ),
  'caps off': (
    GEMMA_2, {'attn_logit_softcapping': None, 'final_logit_softcapping': None},
  ),
  'window absent': (GEMMA_2, {'sliding_window': ...}),
  'window off': (
    GEMMA_2, {'sliding_window': None, 'layer_types': ['full_attention'] * 4},
  ),
  'another window': (GEMMA_3, {'sliding_window': 3}),
  'caps of Gemma 3': (GEMMA_3, {'final_logit_softcapping': 20.0}),
  'scaled': (LLAMA, {'rope_parameters': LINEAR}),
  'scaled Qwen': ('qwen2', {'rope_parameters': LINEAR}),
  'scaled Qwen 3': ('qwen3, wide heads', {'rope_parameters': LINEAR}),
  'scaled NeoX': (
    'neox, a quarter rotary (Pythia)',
    {'rope_parameters': LINEAR | {'partial_rotary_factor': 0.5}},
  ),
  'scaled Gemma 3': (
    GEMMA_3,
    {
      'rope_parameters': {
        'full_attention': LINEAR,
        'sliding_attention': {'rope_theta': 1e4},
      }
    },
  ),
}  # fmt: skip


@pytest.mark.parametrize('way', WAYS)
def test_both_formats_of_a_model_are_one_model(way, tmp_path):
  name, changes = WAYS[way]
  record = changed(name, **changes)
  url = hf_folder.write(tmp_path, record)
  from_gguf = subject.load(gguf_models.write(tmp_path / 'm.gguf', record))
  from_folder, params, _ = folder.load_params(url)
  # The format has no key for the scale of scores, and turns other pairs of
  # a Llama.
  allowed = {'norm_eps', 'attn_scale', 'rope_pairs' if name == LLAMA else ''}
  got, want = map(dataclasses.asdict, (from_gguf.config, from_folder))
  assert {key for key in want if got[key] != want[key]} <= allowed
  if name != LLAMA:
    jax.tree.map(np.testing.assert_array_equal, from_gguf.params, params)
    return
  got, want = (
    forward(config, values, TOKENS)
    for config, values in (
      (from_gguf.config, from_gguf.params), (from_folder, params),
    )
  )  # fmt: skip
  np.testing.assert_allclose(got, want, atol=2e-5)


TOKENS = np.random.default_rng(0).integers(0, 97, (1, 12))


def test_a_wrong_cap_is_seen_in_the_logits(tmp_path):
  record = changed(GEMMA_2, attn_logit_softcapping=...)
  config, params, _ = folder.load_params(hf_folder.write(tmp_path, record))
  assert config.attn_softcap == 50
  off = dataclasses.replace(config, attn_softcap=0.0)
  difference = forward(config, params, TOKENS) - forward(off, params, TOKENS)
  assert np.abs(difference).max() > 1e-4


def test_gemma_2_has_caps_and_windows_of_its_own():
  config = config_of('gemma2')
  assert (config.attn_softcap, config.final_softcap) == (50, 30)
  assert config.windows == (4096, 0) * 6
  off = {'attn_logit_softcapping': 0.0, 'attention__sliding_window': 0}
  config = config_of('gemma2', **off)
  assert (config.attn_softcap, config.windows) == (0, ())
  # Gemma 3 has none of its own.
  config = config_of('gemma3')
  assert (config.attn_softcap, config.final_softcap, config.windows) == (
    0, 0, (),
  )  # fmt: skip


def test_windows_by_a_period_or_one_by_one():
  key = 'attention__sliding_window_pattern'
  window = {'attention__sliding_window': 9}
  assert config_of('gemma3', **window).windows == (9, 9, 9, 9, 9, 0) * 2
  period = config_of('gemma3', **window, **{key: 3})
  assert period.windows == (9, 9, 0) * 4
  slides = [True] * 11 + [False]
  listed = config_of('gemma3', **window, **{key: slides})
  assert listed.windows == (9,) * 11 + (0,)
  with pytest.raises(errors.UserError, match='a list of 12 values, one for'):
    config_of('gemma3', **window, **{key: [True]})


@pytest.mark.parametrize(
  'keys, factor',
  [
    ({'rope__scaling__factor': 4.0}, 4),
    ({'rope__scaling__factor': 0.0}, 1),
    ({'rope__scale_linear': 4.0}, 4),
    ({'rope__scaling__type': 'linear', 'rope__scaling__factor': 4.0}, 4),
    ({'rope__scaling__type': 'none', 'rope__scaling__factor': 4.0}, 1),
    ({'rope__scaling__type': 'linear'}, 1),
  ],
)
def test_a_scaling_factor_without_a_type_is_linear(keys, factor):
  scaling = config_of('llama', **keys).rope_scaling
  assert (scaling.factor if scaling else 1) == factor


def test_factors_of_frequencies_join_the_scaling():
  factors = tuple(map(float, range(1, 9)))
  config = config_of('llama', factors=factors, rope__scaling__factor=2.0)
  assert config.rope_scaling.factors == tuple(2 * x for x in factors)
  with pytest.raises(errors.UserError, match=r'has 1 factors .* must have 8'):
    config_of('llama', factors=(1.0,))


def test_a_value_for_each_block(tmp_path):
  keys = ('feed_forward_length', 'attention.head_count_kv')
  record = hf_folder.golden()[LLAMA]
  values = gguf_models.metadata(record)
  alike = {key: [values[key]] * 4 for key in keys}
  path = gguf_models.write(tmp_path / 'm.gguf', record, more=alike)
  plain = subject.load(gguf_models.write(tmp_path / 'p.gguf', record))
  assert subject.load(path).config == plain.config
  with pytest.raises(errors.UserError, match=r'4, 4, 2.* use a model whose bl'):
    config_of('llama', attention__head_count=[4, 4, 2] * 4)
  with pytest.raises(errors.UserError, match='for its 12 blocks, which differ'):
    config_of('llama', attention__head_count=[4])


REFUSED = [
  ('llama', {'attn_logit_softcapping': 50.0}, 'which the family llama does'),
  ('llama', {'attention__scale': 0.5}, 'which the family llama does not have'),
  ('llama', {'attention__clamp_kqv': 8.0}, 'which the family llama does not'),
  ('llama', {'rope__scaling__attn_factor': 2.0}, 'the family llama does not'),
  ('llama', {'logit_scale': 0.1}, 'which the family llama does not have'),
  ('llama', {'attention__causal': False}, 'it must be True as elsewhere'),
  ('llama', {'attention__value_length': 32}, 'it must be 16 as elsewhere'),
  ('qwen3', {'attention__sliding_window': 64, 'context_length': 512},
   'sliding windows of 64 are not supported in this family'),
  ('gemma2', {'rope__freq_base_swa': 5e5, 'rope__scaling__factor': 2.0},
   'rotary scaling beside rope.freq_base_swa 500000 is not supported'),
  ('qwen3', {'context_length': None}, 'does not say context_length: convert'),
  ('llama', {'block_count': 2**40}, 'it must be a whole number from 1 to 10,0'),
  ('llama', {'block_count': 'x'}, "says block_count 'x', it must be a whole"),
  ('llama', {'rope__freq_base': float('inf')}, 'it must be a finite number'),
  ('llama', {'rope__dimension_count': 99}, 'a whole number from 1 to 16'),
]  # fmt: skip


@pytest.mark.parametrize('architecture, keys, message', REFUSED)
def test_what_is_not_known_is_refused(architecture, keys, message):
  with pytest.raises(errors.UserError) as error:
    config_of(architecture, **keys)
  assert message in str(error.value)


def test_a_window_as_long_as_any_context_is_none():
  keys = {'attention__sliding_window': 512, 'context_length': 512}
  assert config_of('llama', **keys).windows == ()


def test_a_key_that_is_not_read_is_named(caplog):
  with caplog.at_level(logging.WARNING, logger='absl'):
    config_of('llama', expert_count=0, attention__odd=7)
  assert 'says llama.attention.odd 7, which is not read' in caplog.text
  assert 'expert_count' not in caplog.text
  metadata = {'general.architecture': 'gpt2', 'gem.attention.sliding_window': 6}
  values = gguf_models.metadata(hf_folder.golden()['gpt2'])
  metadata |= {f'gpt2.{key}': value for key, value in values.items()}
  with caplog.at_level(logging.WARNING, logger='absl'):
    gguf_families.transformer_config(metadata, 97)
  assert 'says gem.attention.sliding_window 6, which is not r' in caplog.text


def test_a_split_model_is_read_whole(tmp_path):
  record = hf_folder.golden()[LLAMA]
  whole = subject.load(gguf_models.write(tmp_path / 'w.gguf', record))
  first = gguf_models.write(tmp_path / 'm.gguf', record, split=15)
  parts = sorted(tmp_path.glob('m-*.gguf'))
  assert len(parts) == 3
  by_first, by_last = subject.load(first), subject.load(str(parts[-1]))
  for read in (by_first, by_last):
    assert read.config == whole.config
    jax.tree.map(np.testing.assert_array_equal, read.params, whole.params)
  assert by_first.weights_sha256 == by_last.weights_sha256

  def refused(path):
    with pytest.raises(errors.UserError) as error:
      subject.load_tokenizer(str(path))
    return str(error.value)

  other = shutil.copy(first, tmp_path / 'other.gguf')
  assert 'merge them with gguf-split --merge' in refused(other)
  swapped = tmp_path / 'swapped'
  swapped.mkdir()
  for one, two in zip(parts, parts[::-1]):
    shutil.copy(one, swapped / two.name)
  assert 'is not part 1 of 3 by its own metadata' in refused(
    swapped / pathlib.Path(first).name
  )
  parts[1].unlink()
  assert refused(first).startswith(f'no file at {parts[1]}, one of 3 parts')
