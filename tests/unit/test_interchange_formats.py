"""Autoencoders of other libraries, beside what those compute themselves."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from sae_jax import errors
from sae_jax.interchange import formats, imported, registry
from sae_jax.interchange.files import pt_writer, reading
from sae_jax.storage import safetensors, tensors
from tests.support import golden_autoencoders as golden
from tests.support import interchange_reference as reference

# What two libraries divide by the decoder's norm in float32.
ROUNDED = {'dictionary_learning/AutoEncoder': 1e-5, 'llama_scope/L0R': 1e-6}


def distance(one, other):
  return max(np.abs(a - b).max() for a, b in zip(one, other))


def refused(call, *args):
  with pytest.raises(errors.UserError) as error:
    call(*args)
  line = str(error.value)
  assert line.isprintable() and len(line) < 1100
  return line


@pytest.mark.parametrize('name', golden.NAMES)
def test_the_function_is_that_of_the_library(name):
  kind = golden.format_of(name)
  autoencoder = golden.read(name)
  assert autoencoder.format == kind
  expected = golden.expected(name)
  x, theirs = expected['x'], (expected['z'], expected['y'])
  ours = reference.evaluate(autoencoder, x)
  assert distance(ours, theirs) < ROUNDED.get(name, 1e-12)
  assert (autoencoder.d_in, autoencoder.d_out, autoencoder.n_latents) == (
    x.shape[1],
    theirs[1].shape[1],
    theirs[0].shape[1],
  )
  for stored, tensor in autoencoder.tensors.items():
    sizes = {'N': autoencoder.n_latents, 'D': x.shape[1]}
    if stored in ('w_dec_ND', 'b_dec_D'):
      sizes['D'] = autoencoder.d_out
    if stored != 'w_skip_DD':
      axes = stored.rpartition('_')[2]
      assert tensor.shape == tuple(sizes[letter] for letter in axes)


@pytest.mark.parametrize('name', golden.NAMES)
def test_the_formula_is_that_of_the_library(name):
  kind = golden.format_of(name)
  file = {
    'saelens': 'sae_weights.safetensors',
    'sparsify': 'sae.safetensors',
    'gemma_scope': 'params.npz',
    'gemma_scope2': 'params.safetensors',
    'llama_scope': 'checkpoints/final.safetensors',
    'dictionary_learning': 'ae.pt',
    'circuit_tracer': 'layer_0.safetensors',
  }.get(kind, '')
  place = golden.url_of(golden.FOLDER / name, name)
  content = reading.open_tensors(place / file if file else place)
  config = content.values if kind == 'openai' else golden.config(name)
  expected = golden.expected(name)
  weights = reference.read(content.tensors)
  ours = reference.FORMULAS[kind](weights, expected['x'], config)
  assert distance(ours, (expected['z'], expected['y'])) < ROUNDED.get(
    name, 1e-12
  )


def changed(semantics):
  """Semantics of which one field is another, by the field's name."""
  flags = ['subtract_b_dec', 'rescale_by_decoder_norm']
  changes = {flag: not getattr(semantics, flag) for flag in flags}
  if semantics.nonlinearity in ('topk', 'groupmax'):
    changes['k'] = semantics.k - 2 if semantics.nonlinearity == 'topk' else 2
  else:
    changes |= {'nonlinearity': 'topk', 'k': 2}
  if semantics.threshold is not None:
    changes['threshold'] = semantics.threshold + 1
  changes['normalisation'] = 'none'
  if semantics.normalisation == 'none':
    changes['normalisation'] = 'layer_norm'
  if semantics.normalisation == 'dataset':
    changes |= {'scale_in': 1.0, 'scale_out': 1.0}
  for field, value in changes.items():
    if field not in ('nonlinearity', 'k'):
      yield field, {field: value}
  yield (
    'latents',
    {f: changes[f] for f in ('nonlinearity', 'k') if f in changes},
  )


@pytest.mark.parametrize('name', golden.NAMES)
def test_control_each_field_changes_the_function(name):
  autoencoder = golden.read(name)
  expected = golden.expected(name)
  theirs = (expected['z'], expected['y'])
  for field, values in changed(autoencoder.semantics):
    if field == 'subtract_b_dec' and autoencoder.d_in != autoencoder.d_out:
      continue
    other = dataclasses.replace(
      autoencoder,
      semantics=dataclasses.replace(autoencoder.semantics, **values),
    )
    ours = reference.evaluate(other, expected['x'])
    # The decoder of a Llama Scope has rows of unit norm here.
    is_same = (field, name) == ('rescale_by_decoder_norm', 'llama_scope/L0R')
    assert (distance(ours, theirs) > 1e-3) != is_same, field


def test_control_negative_values_and_the_skip_connection_count():
  for name in (
    'circuit_tracer/topk',
    'circuit_tracer/jumprelu',
    'circuit_tracer/relu',
    'saelens/skip_transcoder',
    'sparsify/layers.3.mlp',
  ):
    autoencoder, expected = golden.read(name), golden.expected(name)
    semantics = dataclasses.replace(autoencoder.semantics, is_rectified=True)
    without = {k: t for k, t in autoencoder.tensors.items() if 'skip' not in k}
    other = dataclasses.replace(
      autoencoder, semantics=semantics, tensors=without
    )
    ours = reference.evaluate(other, expected['x'])
    assert distance(ours, (expected['z'], expected['y'])) > 0.1


@pytest.mark.parametrize('is_rescaled', [True, False])
def test_llama_scope_scales_what_is_written_by_its_own_norm(
  is_rescaled, tmp_path
):
  """A transcoder whose decoder has rows of any norm."""
  folder = golden.copy(
    'llama_scope/L0R',
    tmp_path / 'a',
    dataset_average_activation_norm={'in': 2.0, 'out': 0.7},
    sparsity_include_decoder_norm=is_rescaled,
    jump_relu_threshold=0.8,
    hook_point_out='blocks.0.hook_mlp_out',
  )
  path = folder / 'checkpoints/final.safetensors'
  content = reference.read(reading.open_tensors(path).tensors)
  content['decoder.weight'] *= np.linspace(0.5, 2, 20)
  safetensors.write(
    path, {k: tensors.from_array(x) for k, x in content.items()}
  )
  autoencoder = registry.read(folder)
  assert autoencoder.provenance.target_site == 'blocks.0.hook_mlp_out'
  x = golden.expected('llama_scope/L0R')['x']
  config = json.loads((folder / 'hyperparams.json').read_text())
  ours = reference.evaluate(autoencoder, x)
  theirs = reference.llama_scope(content, x, config)
  assert distance(ours, theirs) < 1e-12
  assert 0.05 < (theirs[0] > 0).mean() < 0.6
  # Control: one scale for both, as SAELens has.
  semantics = dataclasses.replace(
    autoencoder.semantics, scale_out=autoencoder.semantics.scale_in
  )
  other = dataclasses.replace(autoencoder, semantics=semantics)
  assert distance(reference.evaluate(other, x), theirs) > 0.1


def test_where_they_are_from():
  provenance = golden.read('saelens/standard').provenance
  assert provenance.model == 'gpt2-small'
  assert provenance.site == 'blocks.3.hook_resid_post'
  assert (provenance.context_size, provenance.prepend_bos) == (128, True)
  assert provenance.settings['d_sae'] == 20
  provenance = golden.read('sparsify/layers.1').provenance
  assert (provenance.model, provenance.site, provenance.context_size) == (
    'EleutherAI/pythia-70m',
    'layers.1',
    64,
  )
  provenance = golden.read('circuit_tracer/relu').provenance
  assert provenance.target_site == 'blocks.0.hook_mlp_out'
  assert golden.read('openai/topk').extra.keys() == {
    'stats_last_nonzero',
    'latents_activation_frequency',
    'latents_mean_square',
  }


def test_what_a_format_does_not_say_is_given(tmp_path):
  place = golden.url_of(golden.FOLDER / 'qwen_scope', 'qwen_scope')
  assert 'give --k, the L0' in refused(registry.read, place)
  assert 'k 21 of 20' in refused(registry.read, place, imported.Given(k=21))
  folder = golden.copy(
    'saelens/jumprelu',
    tmp_path / 'a',
    normalize_activations='expected_average_only_in',
  )
  assert 'give scale_in' in refused(registry.read, folder)
  semantics = registry.read(folder, imported.Given(scale_in=0.5)).semantics
  assert (semantics.scale_in, semantics.scale_out) == (0.5, 0.5)
  scale = folder / 'activation_scaler.json'
  scale.write_text('{"scaling_factor": 0.25}')
  assert registry.read(folder).semantics.scale_in == 0.25
  scale.write_text('{"scaling_factor": null}')
  assert 'has scaling_factor None, where' in refused(registry.read, folder)


CHANGES = [
  ('saelens/topk', {'architecture': 'abstopk'}, "has architecture 'abstopk'"),
  ('saelens/topk', {'architecture': None}, 'has no architecture'),
  ('saelens/topk', {'architecture': ['topk']}, 'has architecture'),
  ('saelens/topk', {'normalize_activations': 'x'}, "normalize_activations 'x'"),
  ('saelens/topk', {'reshape_activations': 'x'}, "reshape_activations 'x'"),
  ('saelens/topk', {'apply_b_dec_to_input': 1}, 'apply_b_dec_to_input 1'),
  ('saelens/topk', {'k': 21}, 'k 21 of 20 latents'),
  ('saelens/topk', {'k': 0}, 'has k 0, where'),
  ('saelens/topk', {'k': True}, 'has k True, where'),
  ('saelens/topk', {'d_sae': 21}, 'where its config and other tensors have'),
  ('saelens/topk', {'d_in': 2**62}, 'has d_in 4611686018427387904'),
  ('saelens/topk', {'metadata': None}, 'has no metadata'),
  ('saelens/topk', {'metadata__sae_lens_version': '5.9'}, "version '5.9'"),
  ('saelens/topk', {'architecture': 'standard', 'd_in': 7}, 'is of the shape'),
  ('saelens/topk', {'architecture': 'jumprelu'}, 'lacks threshold'),
  (
    'saelens/skip_transcoder',
    {'normalize_activations': 'layer_norm'},
    "normalize_activations 'layer_norm'",
  ),
  ('saelens/skip_transcoder', {'apply_b_dec_to_input': True}, 'no transcoder'),
  ('saelens/skip_transcoder', {'architecture': 'transcoder'}, 'besides'),
  ('sparsify/layers.1', {'activation': 'relu'}, "activation 'relu'"),
  ('sparsify/layers.1', {'signed': True}, 'signed True'),
  ('sparsify/layers.1', {'num_latents': 0}, '192 (latents)'),
  ('sparsify/layers.1', {'skip_connection': True}, 'lacks W_skip'),
  ('sparsify/layers.2', {'k': 3}, 'not of one size'),
  ('llama_scope/L0R', {'act_fn': 'topk'}, "act_fn 'topk'"),
  ('llama_scope/L0R', {'norm_activation': 'token-wise'}, "'token-wise'"),
  ('llama_scope/L0R', {'use_glu_encoder': True}, 'use_glu_encoder True'),
  ('llama_scope/L0R', {'jump_relu_threshold': -1}, 'threshold -1, where'),
  (
    'llama_scope/L0R',
    {'dataset_average_activation_norm__in': 0},
    'has in 0, where a number above 0',
  ),
  ('gemma_scope2/{}', {'architecture': 'topk'}, "architecture 'topk'"),
  ('gemma_scope2/{}', {'type': 'crosscoder'}, "type 'crosscoder'"),
  ('gemma_scope2/{}', {'affine_connection': False}, 'besides'),
  ('gemma_scope2/{}', {'width': 16}, '16 (latents)'),
  ('dictionary_learning/{}', {'trainer__dict_class': 'X'}, "dict_class 'X'"),
  ('dictionary_learning/{}', {'trainer__k': 3}, 'has k 3 and'),
  ('dictionary_learning/{}', {'trainer__dict_size': 5}, '5 (latents)'),
  ('dictionary_learning/{}', {'trainer': None}, 'has no trainer'),
  ('dictionary_learning/{}', {'buffer': [1]}, 'has buffer'),
  ('circuit_tracer/topk', {'activation': 'x'}, "activation 'x'"),
  ('circuit_tracer/topk', {'activation': 'jumprelu'}, 'has no thresholds'),
  ('circuit_tracer/topk', {'k': None}, 'has no k'),
  ('circuit_tracer/topk', {'model_kind': 'cross_layer_transcoder'}, 'cross_'),
]
INNER = {
  'gemma_scope2': 'transcoder/layer_3_width_16k_l0_small_affine',
  'dictionary_learning': 'BatchTopKSAE',
}


@pytest.mark.parametrize(('name', 'changes', 'words'), CHANGES)
def test_what_a_config_must_not_say(name, changes, words, tmp_path):
  name = name.format(INNER.get(golden.format_of(name)))
  folder = golden.copy(name, tmp_path / 'a', **changes)
  assert words in refused(golden.read, name, folder)
  # Control: without the change it is read.
  golden.read(name, golden.copy(name, tmp_path / 'a'))


def test_openais_activations(tmp_path):
  file = reading.open_tensors(golden.FOLDER / 'openai/topk/sae.pt')
  path = tmp_path / 'a.pt'
  inner = file.values['activation_state_dict']
  for change, words in (
    ({'activation': 'Identity'}, "has activation 'Identity'"),
    ({'activation_state_dict': {}}, 'has no postact_fn'),
    ({'activation_state_dict': inner | {'k': 0}}, 'has k 0'),
    ({'activation_state_dict': inner | {'postact_fn': 'x'}}, "postact_fn 'x'"),
  ):
    pt_writer.write(path, file.tensors | file.values | change)
    assert words in refused(registry.read, path)
  identity = inner | {'postact_fn': 'Identity'}
  pt_writer.write(
    path, file.tensors | file.values | {'activation_state_dict': identity}
  )
  assert not registry.read(path).semantics.is_rectified


def test_no_format_and_several(tmp_path):
  line = refused(registry.read, tmp_path)
  for name in formats.NAMES:
    assert f'{name}: {formats.of(name).LOOKED_FOR}' in line
  assert 'nothing is at' in refused(registry.read, tmp_path / 'none')
  path = tmp_path / 'a.safetensors'
  safetensors.write(path, {'a': tensors.from_array(np.zeros(3))})
  assert 'a file of no known format' in refused(registry.read, path)
  folder = golden.copy('saelens/topk', tmp_path / 'b')
  shutil.copy(golden.FOLDER / 'sparsify/layers.1/sae.safetensors', folder)
  line = refused(registry.read, folder)
  assert 'may be of 2 formats: saelens, a folder with cfg.json and' in line
  assert registry.read(folder, name='saelens').format == 'saelens'
  assert "called 'x': use one" in refused(registry.read, folder, None, 'x')
  assert 'has no hyperparams' in refused(
    registry.read, folder, None, 'llama_scope'
  )


def test_a_layer_of_several_is_named(tmp_path):
  folder = golden.copy('circuit_tracer/relu', tmp_path / 'a')
  shutil.copy(folder / 'layer_0.safetensors', folder / 'layer_1.safetensors')
  assert 'has 2 layers: give the path of one' in refused(registry.read, folder)
  one = registry.read(folder / 'layer_1.safetensors')
  assert one.provenance.site == 'blocks.1.mlp.hook_in'


def test_a_k_that_is_also_a_tensor(tmp_path):
  folder = golden.copy('circuit_tracer/topk', tmp_path / 'a')
  path = folder / 'layer_0.safetensors'
  content = dict(reading.open_tensors(path).tensors)
  for k, is_it in ((16, True), (3, False)):
    more = {'k': tensors.from_array(np.int64(k))}
    safetensors.write(folder / 'b', content | more)
    (folder / 'b').replace(path)
    if is_it:
      assert registry.read(folder).semantics.k == 16
    else:
      assert 'has k 16 and' in refused(registry.read, folder)


def test_yaml_that_is_more_than_a_mapping(tmp_path):
  folder = golden.copy('circuit_tracer/relu', tmp_path / 'a')
  config = folder / 'config.yaml'
  whole = config.read_text()
  for text, words in (
    ('a: &x [1]\nb: *x\n', 'refers to its own parts'),
    ('!!python/object/apply:os.system ["touch ran"]', 'could not determine a'),
    ('[' * 201, 'more than 200 brackets'),
    ('- ' * 5000, 'is not YAML as it should be'),
    ('- 1', 'it holds a list'),
    (whole + '#' * 2**15, 'more than 32,768 bytes'),
    ('\x00', 'is not YAML as it should be'),
  ):
    config.write_text(text)
    assert words in refused(registry.read, folder)


def test_no_values_are_read(monkeypatch):
  """Shapes and configs are compared before, and values left alone after."""
  opened = []
  monkeypatch.setattr(tensors, '_fill', lambda *args: opened.append(args[-1]))
  for name in golden.NAMES:
    if 'TopK' not in name:
      golden.read(name)
  assert opened == []
  # Control: k of a TopK of dictionary_learning is a tensor, and is compared.
  with pytest.raises(errors.UserError):
    golden.read('dictionary_learning/AutoEncoderTopK')
  assert opened[0].startswith('tensor k of ')
