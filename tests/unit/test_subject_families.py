"""Families read from safetensors folders, beside transformers' own numbers."""

import dataclasses
import hashlib
import json

from etils.epath import testing as epath_testing
import jax
import ml_dtypes
import numpy as np
import pytest

from experiments.parity import models
from sae_jax import errors, subject
from sae_jax.subject import capture
from sae_jax.subject.formats import families, folder
from sae_jax.subject.formats import tokenizer as tokenizer_lib
from tests.support import hf_folder

BOUND = 1e-4


def run_all(config, params, tokens_BT, sites):
  """Logits and sites by their names, in one pass."""
  named = {name: capture.parse_site(name, config) for name in sites}

  @jax.jit
  def run(params):
    record = tuple(dict.fromkeys(named.values()))
    out = capture.run(config, params, tokens_BT, record=record, logits=True)
    return out.logits_BTV, {str(site): x for site, x in out.recorded.items()}

  logits_BTV, recorded = run(params)
  return logits_BTV, {name: recorded[str(site)] for name, site in named.items()}


@pytest.mark.parametrize('name', hf_folder.golden())
def test_logits_and_sites_equal_transformers(name, tmp_path):
  record = hf_folder.golden()[name]
  url = hf_folder.write(tmp_path, record, n_files=1 + ('qwen' in name))
  loaded = subject.load(url)
  tokens_BT = hf_folder.tokens(record)
  logits_BTV, by_site = run_all(
    loaded.config, loaded.params, tokens_BT, record['sites']
  )
  np.testing.assert_allclose(
    models.sample(logits_BTV), record['logits'], rtol=0, atol=BOUND
  )
  assert len(record['sites']) > 12
  for site, expected in record['sites'].items():
    np.testing.assert_allclose(
      models.sample(by_site[site]),
      expected,
      rtol=0,
      atol=BOUND,
      err_msg=site,
    )


# The switch of each family that is easiest to get wrong.
CONTROLS = {
  'neox, a quarter rotary (Pythia)': 'rotary_dim',
  'llama 3 stretched positions': 'rope_scaling',
  'mistral, a window': 'windows + 1',
  'qwen2': 'rope_base',
  'qwen3, wide heads': 'qk_norm',
  'gemma 2, caps and windows': 'attn_softcap',
  'gemma 3, window of 5 in 6 blocks': 'local_rope_base',
}


@pytest.mark.parametrize('name', CONTROLS)
def test_a_wrong_switch_is_seen(name, tmp_path):
  record = hf_folder.golden()[name]
  config, params, _ = folder.load_params(hf_folder.write(tmp_path, record))
  defect = models.defects(config)[CONTROLS[name]]
  logits_BTV, _ = run_all(
    dataclasses.replace(config, **defect),
    params,
    hf_folder.tokens(record),
    (),
  )
  wrong = np.subtract(models.sample(logits_BTV), record['logits'])
  assert np.abs(wrong).max() > 20 * BOUND


GEMMA = 'gemma 2, caps and windows'
LLAMA = 'llama 3 stretched positions'


@pytest.mark.parametrize('defect', ['not one more', 'parts swapped'])
def test_a_tensor_read_wrongly_is_seen(defect, tmp_path, monkeypatch):
  name = GEMMA if defect == 'not one more' else 'gpt2'
  record = hf_folder.golden()[name]
  if defect == 'not one more':
    monkeypatch.setattr(folder.assembly, 'plus_one', lambda tensor: tensor)
  else:
    third = folder.assembly.third
    monkeypatch.setattr(
      folder.assembly, 'third', lambda part, **kw: third((2 - part) % 3, **kw)
    )
  config, params, _ = folder.load_params(hf_folder.write(tmp_path, record))
  logits_BTV, _ = run_all(config, params, hf_folder.tokens(record), ())
  wrong = np.subtract(models.sample(logits_BTV), record['logits'])
  assert np.abs(wrong).max() > 0.1


def small_record(**changes):
  """A Llama of one block, quick to write."""
  record = json.loads(json.dumps(hf_folder.golden()[LLAMA]))
  record['config'] |= {'num_hidden_layers': 1} | changes
  return record


def test_one_file_or_several_are_one_model(tmp_path):
  record = small_record()
  single = subject.load(hf_folder.write(tmp_path / 'one', record))
  several = subject.load(
    hf_folder.write(tmp_path / 'several', record, n_files=3)
  )
  jax.tree.map(np.testing.assert_array_equal, single.params, several.params)
  assert tokenizer_lib.encode(single.tokenizer, 'w3 w14') == [3, 14]
  alone = subject.load_tokenizer(tmp_path / 'one')
  assert alone.to_str() == single.tokenizer.to_str()
  digest = hashlib.sha256((tmp_path / 'one/model.safetensors').read_bytes())
  assert single.weights_sha256 == digest.hexdigest()
  lines = ''
  for path in sorted((tmp_path / 'several').glob('*.safetensors')):
    own = hashlib.sha256(path.read_bytes()).hexdigest()
    lines += f'{own}  {path.name}\n'
  lines = hashlib.sha256(lines.encode())
  assert several.weights_sha256 == lines.hexdigest()


def test_a_folder_in_a_bucket_is_the_local_one(tmp_path):
  record = small_record()
  local = subject.load(hf_folder.write(tmp_path, record, n_files=2))

  def moved(original, url, *args, **kwargs):
    return original(str(url).replace('gs://bucket', str(tmp_path)), *args)

  with epath_testing.mock_epath(open=moved, exists=moved, isdir=moved):
    remote = subject.load('gs://bucket')
    with pytest.raises(errors.UserError, match='is not known: use smollm'):
      subject.load('gs://bucket/nowhere')
  assert remote.weights_sha256 == local.weights_sha256
  jax.tree.map(np.testing.assert_array_equal, remote.params, local.params)


def test_bfloat16_files_and_parameters(tmp_path):
  record = small_record()
  narrow = {
    name: values.astype(ml_dtypes.bfloat16)
    for name, values in hf_folder.tensors(record).items()
  }
  url = hf_folder.write(tmp_path, record, weights=narrow)
  wide, kept = subject.load(url), subject.load(url, dtype='bfloat16')
  assert {x.dtype.name for x in jax.tree.leaves(wide.params)} == {'float32'}
  assert {x.dtype.name for x in jax.tree.leaves(kept.params)} == {'bfloat16'}
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b.astype('float32')),
    wide.params,
    kept.params,
  )
  assert np.array_equal(
    np.asarray(wide.params['embed']),
    narrow['model.embed_tokens.weight'].astype(np.float32),
  )


def test_prefixes_masks_and_an_unused_head_do_not_matter(tmp_path):
  record = hf_folder.golden()['gpt2']
  plain = folder.load_params(hf_folder.write(tmp_path / 'a', record))[1]
  # As GPT-2's own files have it: no prefix, masks, and here a tied head too.
  weights = {
    name.removeprefix('transformer.'): x
    for name, x in hf_folder.tensors(record).items()
  }
  weights['h.0.attn.bias'] = np.ones((1, 1, 4, 4), np.float32)
  weights['lm_head.weight'] = weights['wte.weight']
  odd = folder.load_params(
    hf_folder.write(tmp_path / 'b', record, weights=weights)
  )
  jax.tree.map(np.testing.assert_array_equal, plain, odd[1])


def test_older_files_say_the_same(tmp_path):
  new = hf_folder.golden()[LLAMA]['config']
  rope = dict(new['rope_parameters'])
  old = {k: v for k, v in new.items() if k != 'rope_parameters'}
  old |= {'rope_theta': rope.pop('rope_theta'), 'rope_scaling': rope}
  assert (
    families.transformer_config(old)[0] == (families.transformer_config(new)[0])
  )
  new = hf_folder.golden()['gemma 3, window of 5 in 6 blocks']['config']
  old = {
    k: v for k, v in new.items() if k not in ('rope_parameters', 'layer_types')
  } | {
    'rope_theta': 1e6,
    'rope_local_base_freq': 1e4,
    'sliding_window_pattern': 6,
  }
  config = families.transformer_config(old)[0]
  assert config == families.transformer_config(new)[0]
  assert config.windows == (6, 6, 6, 6, 6, 0, 6)
  # The language model of one that sees, and what its file leaves out.
  seeing = {'model_type': 'gemma3', 'text_config': old}
  assert families.transformer_config(seeing)[0] == config


@pytest.mark.parametrize(
  'changes, message',
  [
    (
      {'model_type': 'mamba'},
      "model_type 'mamba' of {url}/config.json is not supported: use a model "
      'of one of gpt2, gpt_neox, llama, mistral, qwen2, qwen3, gemma, gemma2, '
      'gemma3_text',
    ),
    (
      {'hidden_size': None},
      '{url}/config.json does not say hidden_size: download the model again',
    ),
    (
      {'hidden_act': 'mish'},
      "activation 'mish' of {url}/config.json is not supported: use a model "
      'with one of silu, swish, gelu, gelu_new, gelu_fast, gelu_pytorch_tanh, '
      'relu',
    ),
    (
      {'rope_parameters': {'rope_type': 'yarn', 'factor': 4.0}},
      "{url}/config.json: rope_parameters: rotary scaling 'yarn' is not "
      'supported: use a model with default, linear or llama3 positions',
    ),
    (
      {'intermediate_size': 81},
      'tensor layers.0.mlp.gate_proj.weight of {url} has shape (80, 48), '
      'which does not give the (48, 81) that the config asks for: convert '
      'the model again',
    ),
    (
      {'num_hidden_layers': 2},
      '{url} has no tensor layers.1.input_layernorm.weight among its 12: '
      'download or convert the model again',
    ),
    (
      {'tie_word_embeddings': True, 'model_type': 'qwen2'},
      '{url} has no tensor layers.0.self_attn.q_proj.bias among its 12: '
      'download or convert the model again',
    ),
  ],
)
def test_a_config_that_does_not_fit_is_refused(changes, message, tmp_path):
  record = small_record()
  weights = hf_folder.tensors(record)
  record['config'] |= changes
  url = hf_folder.write(tmp_path, record, weights=weights)
  with pytest.raises(errors.UserError) as error:
    subject.load(url)
  assert str(error.value) == message.format(url=url)


def test_files_that_are_not_whole_are_refused(tmp_path):
  record = small_record()

  def refused(url):
    with pytest.raises(errors.UserError) as error:
      subject.load(url)
    return str(error.value)

  url = hf_folder.write(tmp_path / 'a', record)
  whole = (tmp_path / 'a/model.safetensors').read_bytes()
  for content in (b'', b'no', whole[:40], whole[:-4]):
    (tmp_path / 'a/model.safetensors').write_bytes(content)
    message = refused(url)
    assert message.startswith(
      f'{url}/model.safetensors is not a whole safetensors file '
      f'({len(content)} bytes, '
    )
  (tmp_path / 'a/model.safetensors').unlink()
  assert refused(url).startswith(f'{url} has 0 .safetensors files and no ')
  (tmp_path / 'a/config.json').unlink()
  assert refused(url).startswith(f'{url} has no config.json: ')
  (tmp_path / 'a/tokenizer.json').write_text('{}')
  assert 'tokenizer.json is not a tokenizer (' in refused(url)
  (tmp_path / 'a/tokenizer.json').unlink()
  assert refused(url).startswith(f'{url} has no tokenizer.json: ')

  url = hf_folder.write(tmp_path / 'b', record, n_files=2)
  (tmp_path / 'b/model-00002-of-00002.safetensors').unlink()
  assert refused(url) == (
    f'{url} has no model-00002-of-00002.safetensors, which its index names: '
    'download it again'
  )
  weights = hf_folder.tensors(record) | {'model.layers.0.odd': np.ones(3, 'f')}
  url = hf_folder.write(tmp_path / 'c', record, weights=weights)
  assert refused(url) == (
    f'{url} has 1 tensors that the family does not use, as layers.0.odd: '
    'its model is of another kind, use a plain one'
  )
