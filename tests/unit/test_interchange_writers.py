"""Autoencoders written in a format are the function that they were."""

import dataclasses
import errno
import json

import numpy as np
import pytest

from sae_jax.interchange import formats, imported, registry
from sae_jax.interchange.files import reading
from sae_jax.storage import safetensors, tensors
from tests.support import golden_autoencoders as golden
from tests.support import interchange_reference as reference
from tests.support.made_autoencoders import (
  base,
  changed,
  distance,
  refused,
  TO_MLP,
  TOPK,
  transcoder,
  written,
  X,
)

# Each autoencoder -> formats that hold it with its own tensors, and those that
# hold it once something is folded into them.
SCOPE2 = 'gemma_scope2/transcoder/layer_3_width_16k_l0_small_affine'
HELD = {
  'circuit_tracer/jumprelu': ('circuit_tracer', ''),
  'circuit_tracer/relu': ('circuit_tracer saelens', ''),
  'circuit_tracer/topk': ('', ''),
  'dictionary_learning/AutoEncoder': ('dictionary_learning', 'openai saelens'),
  'dictionary_learning/AutoEncoderNew': (
    'dictionary_learning saelens',
    'openai',
  ),
  'dictionary_learning/AutoEncoderTopK': (
    'dictionary_learning saelens sparsify',
    '',
  ),
  'dictionary_learning/BatchTopKSAE': ('dictionary_learning saelens', ''),
  'dictionary_learning/GatedAutoEncoder': ('dictionary_learning saelens', ''),
  'dictionary_learning/JumpReluAutoEncoder': (
    'dictionary_learning saelens',
    '',
  ),
  'dictionary_learning/MatryoshkaBatchTopKSAE': (
    'dictionary_learning saelens',
    '',
  ),
  'gemma_scope': ('dictionary_learning saelens', ''),
  SCOPE2: ('circuit_tracer saelens', ''),
  'llama_scope/L0R': ('', 'dictionary_learning saelens'),
  'openai/relu': ('openai saelens', 'dictionary_learning'),
  'openai/topk': ('openai saelens', ''),
  'qwen_scope': ('saelens', 'dictionary_learning sparsify'),
  'saelens/batchtopk': ('saelens', 'dictionary_learning'),
  'saelens/gated': ('saelens', ''),
  'saelens/jumprelu': ('dictionary_learning saelens', ''),
  'saelens/skip_transcoder': ('saelens', ''),
  'saelens/standard': ('saelens', ''),
  'saelens/topk': ('saelens', 'dictionary_learning sparsify'),
  'sparsify/layers.1': ('dictionary_learning saelens sparsify', ''),
  'sparsify/layers.2': ('sparsify', ''),
  'sparsify/layers.3.mlp': ('sparsify', ''),
}
PAIRS = [
  (name, kind, is_folded)
  for name, both in HELD.items()
  for is_folded, kinds in enumerate((f'{both[0]} plain', both[1]))
  for kind in kinds.split()
]


def held(name):
  return {kind for golden_name, kind, _ in PAIRS if golden_name == name}


def values(autoencoder):
  return {name: t.read() for name, t in autoencoder.tensors.items()}


def test_every_autoencoder_and_format_is_tried():
  assert HELD.keys() == set(golden.NAMES)
  assert {kind for _, kind, _ in PAIRS} == set(formats.WRITTEN)
  for name in formats.NAMES:
    assert hasattr(formats.of(name), 'lack') == (name in formats.WRITTEN)


@pytest.mark.parametrize(('name', 'kind', 'is_folded'), PAIRS)
def test_it_is_the_same_function_again(name, kind, is_folded, tmp_path):
  autoencoder = golden.read(name)
  again = written(autoencoder, kind, tmp_path)
  x = golden.expected(name)['x']
  assert distance(again, autoencoder, x) < (2e-7 if is_folded else 1e-12)
  before, after = values(autoencoder), values(again)
  if is_folded:
    assert any((before[n] != after[n]).any() for n in before if n in after)
  else:
    for stored, array in after.items():
      if stored in before:
        assert array.dtype == before[stored].dtype
        np.testing.assert_array_equal(array, before[stored])
      else:
        # One threshold of all latents.
        assert stored == 'threshold_N'
        assert (array == autoencoder.semantics.threshold).all()
    assert before.keys() <= after.keys()
  if kind == autoencoder.format or kind == 'plain':
    assert again.semantics == autoencoder.semantics


@pytest.mark.parametrize('name', golden.NAMES)
def test_what_a_format_has_no_word_for_is_refused(name, tmp_path):
  autoencoder = golden.read(name)
  others = ' or '.join(sorted(held(name)))
  for kind in set(formats.WRITTEN) - held(name):
    line = refused(registry.write, autoencoder, kind, tmp_path / kind)
    assert line.endswith(
      f', for which {kind} has no word: write it as {others}'
    )
  assert list(tmp_path.iterdir()) == []


REFUSALS = [
  ('sparsify', {**TOPK, 'normalisation': 'layer_norm'}, 'layer_norm of each'),
  ('openai', {'nonlinearity': 'jumprelu'}, 'the nonlinearity jumprelu'),
  ('openai', TOPK, 'topk without layer_norm'),
  (
    'openai',
    {'nonlinearity': 'relu', 'normalisation': 'layer_norm'},
    'relu with layer_norm',
  ),
  ('saelens', {'nonlinearity': 'groupmax', 'k': 4}, 'groupmax'),
  ('saelens', {**TOPK, 'is_rectified': False}, 'latents below 0'),
  (
    'dictionary_learning',
    {**TOPK, 'normalisation': 'constant_norm_rescale'},
    'constant_norm_rescale of each token',
  ),
  ('circuit_tracer', {'nonlinearity': 'relu'}, 'no site that it writes'),
]


@pytest.mark.parametrize(('kind', 'semantics', 'words'), REFUSALS)
def test_a_refusal_names_the_property(kind, semantics, words, tmp_path):
  line = refused(registry.write, base(**semantics), kind, tmp_path / 'a')
  assert words in line and 'plain' in line


def test_a_refused_transcoder(tmp_path):
  topk = transcoder(**TOPK)
  line = refused(registry.write, topk, 'saelens', tmp_path / 'a')
  assert 'topk of a transcoder' in line
  assert 'write it as plain or sparsify' in line
  normal = transcoder(nonlinearity='relu', normalisation='layer_norm')
  line = refused(registry.write, normal, 'saelens', tmp_path / 'a')
  assert 'the normalisation layer_norm of a transcoder' in line
  relu = transcoder(nonlinearity='relu')
  for kind in ('openai', 'dictionary_learning'):
    line = refused(registry.write, relu, kind, tmp_path / 'a')
    assert 'another site or width that it writes (blocks.2.mlp_out)' in line
  elsewhere = dataclasses.replace(TO_MLP, target_site='final_norm')
  relu = dataclasses.replace(relu, provenance=elsewhere)
  line = refused(registry.write, relu, 'circuit_tracer', tmp_path / 'a')
  assert 'the site final_norm, which names no layer' in line


def test_formats_that_are_only_read(tmp_path):
  line = refused(registry.write, base(**TOPK), 'gemma_scope', tmp_path / 'a')
  assert line == (
    'gemma_scope is read, not written: use one of circuit_tracer, '
    'dictionary_learning, openai, plain, saelens, sparsify'
  )
  assert 'called' in refused(registry.write, base(**TOPK), 'x', tmp_path / 'a')


def test_what_is_there_is_not_replaced(tmp_path):
  for kind in formats.WRITTEN:
    (tmp_path / 'a').write_text('mine')
    autoencoder = transcoder(nonlinearity='relu')
    if kind not in ('circuit_tracer', 'saelens', 'plain'):
      autoencoder = base(**TOPK, normalisation='none')
    if kind == 'openai':
      autoencoder = base(nonlinearity='relu')
    line = refused(registry.write, autoencoder, kind, tmp_path / 'a')
    assert 'is there already' in line
    assert (tmp_path / 'a').read_text() == 'mine'
    (tmp_path / kind).mkdir()
    if kind != 'openai':
      registry.write(autoencoder, kind, tmp_path / kind)
      assert 'there already' in refused(
        registry.write, autoencoder, kind, tmp_path / kind
      )


@pytest.mark.parametrize('kind', formats.WRITTEN)
def test_a_failure_leaves_nothing_that_is_read(kind, tmp_path):
  def part(ranges):
    if ranges[0][1] > 10:
      raise OSError(errno.ENOSPC, 'the disk is full')
    return np.zeros([stop - start for start, stop in ranges], 'f')

  autoencoder = transcoder(nonlinearity='relu')
  if kind in ('openai', 'dictionary_learning'):
    autoencoder = base(nonlinearity='relu')
  if kind == 'sparsify':
    autoencoder = base(**TOPK)
  broken = tensors.Tensor((20, 6), np.dtype(np.float32), part)
  autoencoder = changed(autoencoder, {'w_dec_ND': broken})
  with pytest.raises(OSError, match='is full'):
    registry.write(autoencoder, kind, tmp_path / 'a')
  assert [p for p in tmp_path.rglob('*') if p.is_file()] == []


def test_controls_what_the_comparison_sees(tmp_path):
  """Faults that a writer could have."""
  name = 'sparsify/layers.1'
  autoencoder, x = golden.read(name), golden.expected(name)['x']
  again = written(autoencoder, 'saelens', tmp_path)
  folder = tmp_path / 'sae'
  stored = dict(
    reading.open_tensors(folder / 'sae_weights.safetensors').tensors
  )
  config = json.loads((folder / 'cfg.json').read_text())

  def other(number, settings=None, **arrays):
    path = tmp_path / str(number)
    content = stored | {k: tensors.from_array(a) for k, a in arrays.items()}
    safetensors.write(path / 'sae_weights.safetensors', content)
    text = json.dumps(config | (settings or {}))
    (path / 'cfg.json').write_text(text)
    return registry.read(path)

  assert distance(other(0), again, x) == 0
  w_dec_ND, b_dec_D = stored['W_dec'].read(), stored['b_dec'].read()
  turned = w_dec_ND.reshape(w_dec_ND.T.shape).T.copy()
  for number, bad in enumerate(
    (
      other(1, W_dec=turned),
      other(2, b_dec=0 * b_dec_D),
      other(3, {'k': config['k'] - 1}),
      other(4, {'apply_b_dec_to_input': False}),
      other(5, {'normalize_activations': 'layer_norm'}),
      other(6, W_enc=stored['W_enc'].read()[::-1].copy()),
    )
  ):
    assert distance(bad, autoencoder, x) > 1e-3, number


def test_control_a_standard_deviation_of_another_kind(tmp_path, monkeypatch):
  name = 'openai/topk'
  autoencoder, expected = golden.read(name), golden.expected(name)
  again = written(autoencoder, 'saelens', tmp_path)
  x = expected['x']
  right = reference.evaluate(again, x)[1]
  assert np.abs(right - expected['y']).max() < 1e-12
  # As if the sum of squares were divided by D.
  monkeypatch.setattr(
    reference,
    '_normalised',
    lambda s, x: (
      (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-5),
      lambda v: v * x.std(-1, keepdims=True) + x.mean(-1, keepdims=True),
    ),
  )
  wrong = reference.evaluate(again, x)[1]
  assert np.abs(wrong - expected['y']).max() > 1e-2


def test_where_it_is_from_is_written_too(tmp_path):
  autoencoder = golden.read('saelens/topk')
  # The library's own words are kept.
  again = written(autoencoder, 'saelens', tmp_path)
  assert again.provenance.settings == autoencoder.provenance.settings
  again = written(autoencoder, 'plain', tmp_path / 'plain')
  for field in ('model', 'site', 'target_site', 'context_size', 'prepend_bos'):
    assert getattr(again.provenance, field) == getattr(
      autoencoder.provenance, field
    )
  origin = written(
    autoencoder, 'dictionary_learning', tmp_path / 'd'
  ).provenance
  assert (origin.model, origin.context_size) == ('gpt2-small', 128)
  assert origin.settings['trainer']['layer'] == 3
  # But for what is known by now.
  other = dataclasses.replace(autoencoder.provenance, model='another')
  moved = dataclasses.replace(autoencoder, provenance=other)
  again = written(moved, 'saelens', tmp_path / 'moved')
  assert again.provenance.model == 'another'
  # Sites of ours have TransformerLens's names there.
  site = imported.Provenance(site='blocks.4.resid_post', reshape='hook_z')
  own = dataclasses.replace(base(**TOPK), provenance=site)
  again = written(own, 'saelens', tmp_path / 's')
  assert again.provenance.site == 'blocks.4.hook_resid_post'
  assert again.provenance.reshape == 'hook_z'
  assert again.provenance.settings['metadata'] == {
    'sae_lens_version': '6.54.12',
    'sae_lens_training_version': None,
    'hook_name': 'blocks.4.hook_resid_post',
  }


def test_openais_statistics(tmp_path):
  autoencoder = golden.read('openai/relu')
  again = written(autoencoder, 'openai', tmp_path)
  assert again.extra.keys() == autoencoder.extra.keys()
  for name, tensor in autoencoder.extra.items():
    array = again.extra[name].read()
    assert array.dtype == tensor.dtype
    np.testing.assert_array_equal(array, tensor.read())
  odd = base(**TOPK, normalisation='layer_norm', is_rectified=False)
  again = written(odd, 'openai', tmp_path / 'odd')
  assert not again.semantics.is_rectified
  assert distance(again, odd, X) < 1e-6
  counted = again.extra['latents_activation_frequency'].read()
  assert (counted == np.ones(20)).all()


def test_layers_of_a_set_lie_in_one_folder(tmp_path):
  autoencoder = transcoder(nonlinearity='relu')
  folder = tmp_path / 'a'
  registry.write(autoencoder, 'circuit_tracer', folder)
  assert {p.name for p in folder.iterdir()} == {
    'config.yaml',
    'layer_2.safetensors',
  }
  provenance = registry.read(folder).provenance
  assert provenance.site == 'blocks.2.mlp.hook_in'
  assert provenance.target_site == 'blocks.2.hook_mlp_out'
  path = folder / 'layer_3.safetensors'
  registry.write(autoencoder, 'circuit_tracer', path)
  assert registry.read(path).provenance.site == 'blocks.3.mlp.hook_in'
  other = dataclasses.replace(
    autoencoder, provenance=dataclasses.replace(TO_MLP, model='another')
  )
  path = folder / 'layer_4.safetensors'
  line = refused(registry.write, other, 'circuit_tracer', path)
  assert 'config.yaml is of other transcoders' in line and not path.exists()
  scope = golden.read(SCOPE2)
  again = written(scope, 'circuit_tracer', tmp_path / 'scope')
  assert again.provenance.site == 'blocks.3.mlp.hook_in'
  assert again.provenance.target_site == 'blocks.3.hook_mlp_out'


def test_a_transcoder_of_sparsify_reads_what_enters_its_module(tmp_path):
  autoencoder = golden.read('sparsify/layers.3.mlp')
  provenance = autoencoder.provenance
  assert (provenance.site, provenance.target_site) == (
    'layers.3.mlp.input',
    'layers.3.mlp',
  )
  again = written(autoencoder, 'sparsify', tmp_path / 'a')
  assert again.provenance.settings['transcode']
  # The name of the folder is none of a module.
  assert (again.provenance.site, again.provenance.target_site) == (
    None,
    'target',
  )
  # An autoencoder is none there, although it subtracts no bias.
  again = written(base(**TOPK), 'sparsify', tmp_path / 'b')
  assert not again.provenance.settings['transcode']
  assert distance(again, base(**TOPK), X) < 1e-6


def test_a_transcoder_that_does_not_say_what_it_writes(tmp_path):
  """It stays one, of the libraries that know transcoders."""
  folder = golden.copy('saelens/standard', tmp_path / 'a')
  path = folder / 'cfg.json'
  changes = {
    'architecture': 'transcoder',
    'd_out': 6,
    'apply_b_dec_to_input': False,
    'normalize_activations': 'none',
  }
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  autoencoder = registry.read(folder)
  assert autoencoder.provenance.target_site == imported.TARGET
  again = written(autoencoder, 'saelens', tmp_path / 'b')
  settings = again.provenance.settings
  assert settings['architecture'] == 'transcoder'
  assert 'hook_name_out' not in settings['metadata']
  assert again.provenance.target_site == imported.TARGET
  scope = golden.copy(SCOPE2, tmp_path / 'c', hf_hook_point_out=None)
  assert registry.read(scope).provenance.target_site == imported.TARGET
