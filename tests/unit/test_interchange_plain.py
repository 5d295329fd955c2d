"""The format of our own says in words what it is."""

import contextlib
import dataclasses
import json
import random

import numpy as np
import pytest

from sae_jax import errors
from sae_jax.interchange import formats, registry
from sae_jax.storage import safetensors
from tests.support import damages
from tests.support import golden_autoencoders as golden
from tests.support import interchange_reference as reference
from tests.support.made_autoencoders import base, refused, TOPK, written


def test_the_formula_in_words(tmp_path):
  registry.write(golden.read('saelens/topk'), 'plain', tmp_path / 'a')
  config = json.loads((tmp_path / 'a/autoencoder.json').read_text())
  assert config['formula'] == [
    'v = x',
    'u = v - b_dec_D',
    'h = w_enc_ND u + b_enc_N',
    'n = the norm of each row of w_dec_ND',
    'h = h n',
    'z = h for the k largest h, else 0',
    'z = max(z, 0)',
    'r = the sum of each z times its row of w_dec_ND / its n, plus b_dec_D',
    'y = r',
  ]
  assert config['tensors']['w_dec_ND'] == 'n_latents by d_out'
  assert config['semantics']['k'] == golden.K


def test_each_function_has_a_formula_and_each_formula_a_function():
  """But for thresholds of a batch, which are thresholds."""
  by_function, by_formula = {}, {}
  for name in golden.NAMES:
    autoencoder = golden.read(name)
    semantics, has_skip = (
      autoencoder.semantics,
      'w_skip_DD' in autoencoder.tensors,
    )
    formula = tuple(formats.of('plain').formula(semantics, has_skip))
    kind = semantics.nonlinearity.replace('batchtopk', 'jumprelu')
    function = (
      dataclasses.replace(semantics, nonlinearity=kind, k=None, threshold=None),
      has_skip,
    )
    by_function.setdefault(str(function), set()).add(formula)
    by_formula.setdefault(formula, set()).add(str(function))
  assert {len(all_of_one) for all_of_one in by_function.values()} == {1}
  assert {len(all_of_one) for all_of_one in by_formula.values()} == {1}
  assert len(by_formula) > 12


def followed(folder, x_BD):
  """Latents and reconstruction by the lines of the formula and the tensors.

  Every line is one of those that are understood here.
  """
  config = json.loads((folder / 'autoencoder.json').read_text())
  stored, _ = safetensors.read(folder / 'autoencoder.safetensors')
  w = reference.read(stored)
  s, d_in = config['semantics'], config['d_in']
  v = {'x': x_BD}

  def above():
    threshold = s['threshold']
    threshold = w['threshold_N'] if threshold is None else threshold
    return np.where(v['h'] > threshold, v['h'], 0)

  def largest_of_groups():
    groups = v['h'].reshape(len(x_BD), s['k'], -1)
    is_largest = groups == groups.max(-1, keepdims=True)
    return (groups * is_largest).reshape(v['h'].shape)

  def gated():
    magnitude = np.maximum(np.exp(w['r_mag_N']) * v['h'] + w['b_mag_N'], 0)
    return np.where(v['h'] + w['b_gate_N'] > 0, magnitude, 0)

  def normed():
    v['m'] = x_BD.mean(-1, keepdims=True)
    v['s'] = np.sqrt(((x_BD - v['m']) ** 2).sum(-1, keepdims=True) / (d_in - 1))
    return (x_BD - v['m']) / (v['s'] + 0.00001)

  plain = formats.of('plain')
  length = np.linalg.norm(x_BD, axis=-1, keepdims=True)
  known = {
    **dict(zip(plain.NORMALISED['none'], (lambda: x_BD, lambda: v['r']))),
    plain.NORMALISED['layer_norm'][0]: normed,
    'y = r s + m': lambda: v['r'] * v['s'] + v['m'],
    'v = x sqrt(d_in) / |x|': lambda: x_BD * d_in**0.5 / length,
    'y = r |x| / sqrt(d_in)': lambda: v['r'] * length / d_in**0.5,
    'v = x scale_in': lambda: x_BD * s['scale_in'],
    'y = r / scale_out': lambda: v['r'] / s['scale_out'],
    'u = v - b_dec_D': lambda: v['v'] - w['b_dec_D'],
    'u = v': lambda: v['v'],
    'h = w_enc_ND u': lambda: v['u'] @ w['w_enc_ND'].T,
    'h = w_enc_ND u + b_enc_N': lambda: v['u'] @ w['w_enc_ND'].T + w['b_enc_N'],
    'n = the norm of each row of w_dec_ND': lambda: np.sqrt(
      (w['w_dec_ND'] ** 2).sum(1)
    ),
    'h = h n': lambda: v['h'] * v['n'],
    'h = max(h, 0)': lambda: np.maximum(v['h'], 0),
    'z = max(z, 0)': lambda: np.maximum(v['z'], 0),
    plain.ACTIVE['relu']: lambda: np.maximum(v['h'], 0),
    plain.ACTIVE['topk']: lambda: reference.keep_largest(v['h'], s['k']),
    plain.ACTIVE['groupmax']: largest_of_groups,
    plain.ACTIVE['jumprelu']: above,
    plain.ACTIVE['gated']: gated,
    'r = the sum of each z times its row of w_dec_ND, plus b_dec_D': lambda: (
      v['z'] @ w['w_dec_ND'] + w['b_dec_D']
    ),
    'r = the sum of each z times its row of w_dec_ND / its n, plus b_dec_D': (
      lambda: (v['z'] / v['n']) @ w['w_dec_ND'] + w['b_dec_D']
    ),
    'y = y + w_skip_DD x': lambda: v['y'] + x_BD @ w['w_skip_DD'].T,
  }
  for line in config['formula']:
    v[line[0]] = known[line]()
  return v['z'], v['y']


@pytest.mark.parametrize('name', golden.NAMES)
def test_who_follows_the_formula_gets_the_same_numbers(name, tmp_path):
  registry.write(golden.read(name), 'plain', tmp_path / 'a')
  expected = golden.expected(name)
  by_words = followed(tmp_path / 'a', expected['x'])
  for ours, theirs in zip(by_words, (expected['z'], expected['y'])):
    assert np.abs(ours - theirs).max() < 1e-5
  # Control: without a line that changes what is there it is another function,
  # but for a ReLU of what is never below 0 and norms that are 1.
  path = tmp_path / 'a/autoencoder.json'
  config = json.loads(path.read_text())
  lines = config['formula']
  same = {'h = max(h, 0)', 'z = max(z, 0)'}
  if name == 'llama_scope/L0R':
    same |= {'h = h n'}
  for line in {line for line in lines if line[0] in line[4:]} - same:
    text = config | {'formula': [one for one in lines if one != line]}
    path.write_text(json.dumps(text))
    with contextlib.suppress(KeyError):
      other = followed(tmp_path / 'a', expected['x'])
      assert np.abs(other[1] - expected['y']).max() > 1e-3


@pytest.mark.parametrize('seed', range(20))
def test_a_damaged_one_is_read_or_refused(seed, tmp_path):
  autoencoder = golden.read('saelens/topk')
  registry.write(autoencoder, 'plain', tmp_path / 'a')
  rng = random.Random(seed)
  path = (
    tmp_path / 'a' / rng.choice(['autoencoder.json', 'autoencoder.safetensors'])
  )
  change = damages.odd_json
  if path.suffix == '.safetensors':
    change = damages.odd_tensors
  path.write_bytes(change(path.read_bytes(), rng))
  try:
    for tensor in registry.read(tmp_path / 'a').tensors.values():
      tensor.read()
  except errors.UserError as error:
    assert str(error).isprintable() and len(str(error)) < 1100


PLAIN = [
  ({'subtract_b_dec': True, 'd_out': 7}, 'a bias of width 7 from activations'),
  ({'nonlinearity': 'groupmax', 'k': 3}, '20 latents in k 3 groups'),
  ({'version': 2}, 'has version 2, where 1 should be'),
  ({'format': 'x'}, "has format 'x'"),
  ({'d_in': 7}, '7 (width)'),
  ({'origin': None}, 'has origin None'),
  ({'semantics': {}}, 'lacks or has besides: is_rectified, k,'),
  ({'nonlinearity': 'x'}, "has nonlinearity 'x'"),
  ({'normalisation': 'x'}, "has normalisation 'x'"),
  ({'normalisation': 'dataset'}, 'has scale_in None'),
  ({'k': None}, 'has k None'),
  ({'k': 21}, 'k 21 of 20'),
  ({'is_rectified': 1}, 'has is_rectified 1'),
  ({'nonlinearity': 'jumprelu'}, 'lacks threshold_N'),
  ({'nonlinearity': 'jumprelu', 'threshold': 'x'}, "has threshold 'x'"),
  ({'nonlinearity': 'gated'}, 'lacks b_gate_N, b_mag_N, r_mag_N'),
]


@pytest.mark.parametrize(('changes', 'words'), PLAIN)
def test_what_a_plain_config_must_not_say(changes, words, tmp_path):
  again = written(base(**TOPK), 'plain', tmp_path)
  path = tmp_path / 'sae/autoencoder.json'
  config = json.loads(path.read_text())
  for key, value in changes.items():
    inner = config if key in config else config['semantics']
    inner[key] = value
  path.write_text(json.dumps(config))
  assert words in refused(registry.read, again.url)
