"""Every family's GGUF files beside the same model's safetensors."""

import dataclasses

import numpy as np
import pytest

from experiments.parity import models
from sae_jax import subject
from sae_jax.subject import transformer
from sae_jax.subject.formats import folder, gguf_families
from tests.support import gguf_models, hf_folder

MODELS = [
  name
  for name, record in hf_folder.golden().items()
  # What GGUF's keys have no room for: windows of Mistral, biases of Llama.
  if record['config']['model_type'] != 'mistral' and 'biases' not in name
]


@pytest.mark.parametrize('name', MODELS)
def test_the_file_is_the_same_model(name, tmp_path):
  record = hf_folder.golden()[name]
  path = gguf_models.write(tmp_path / 'm.gguf', record)
  loaded = subject.load(path)
  config, params, _ = folder.load_params(hf_folder.write(tmp_path, record))
  got = dataclasses.asdict(loaded.config)
  want = dataclasses.asdict(config)
  differ = {key for key in want if got[key] != want[key]}
  # Rounded to float32, in another form, or left out by the format.
  np.testing.assert_allclose(got['norm_eps'], want['norm_eps'], rtol=1e-6)
  allowed = {'norm_eps'}
  if 'llama' in name:
    allowed |= {'rope_pairs', 'rope_scaling'}
  if 'gemma' in name:
    allowed |= {'attn_scale'}
  if 'gpt2' in name:
    allowed |= {'rope_base'}
  assert differ <= allowed
  # Queries and keys of a Llama are in another order.
  blocks = params['blocks']
  for key, values in blocks.items():
    if 'llama' not in name or not key.startswith(('query', 'key')):
      np.testing.assert_array_equal(loaded.params['blocks'][key], values, key)
  for key in params:
    if key != 'blocks':
      np.testing.assert_array_equal(loaded.params[key], params[key])


@pytest.mark.parametrize('defect', [None, 'no factors', 'half pairs'])
def test_a_permuted_llama_gives_transformers_logits(defect, tmp_path):
  record = hf_folder.golden()['llama 3 stretched positions']
  loaded = subject.load(gguf_models.write(tmp_path / 'm.gguf', record))
  config = loaded.config
  if defect == 'no factors':
    config = dataclasses.replace(config, rope_scaling=None)
  if defect == 'half pairs':
    config = dataclasses.replace(config, rope_pairs='half')
  logits = transformer.forward(config, loaded.params, hf_folder.tokens(record))
  error = np.subtract(models.sample(logits), record['logits'])
  if defect is None:
    assert np.abs(error).max() < 1e-4
  else:
    assert np.abs(error).max() > 1e-2


def test_the_largest_gemmas_scale_by_their_width():
  def config(n_layers):
    return gguf_families.transformer_config(
      {
        'general.architecture': 'gemma2',
        'gemma2.block_count': n_layers,
        'gemma2.context_length': 8192,
        'gemma2.embedding_length': 4608,
        'gemma2.feed_forward_length': 36_864,
        'gemma2.attention.head_count': 32,
        'gemma2.attention.head_count_kv': 16,
        'gemma2.attention.key_length': 128,
        'gemma2.attention.layer_norm_rms_epsilon': 1e-6,
        'gemma2.attention.sliding_window': 4096,
      },
      vocab_size=256_000,
    )

  # 27B is the one whose config.json says query_pre_attn_scalar 144.
  np.testing.assert_allclose(config(46).attn_scale, 144**-0.5)
  assert config(26).attn_scale == 0
  assert config(26).windows[:3] == (4096, 0, 4096)
