"""The format of our own says in words what it is."""

import dataclasses
import json

import pytest

from sae_jax.interchange import formats, registry
from tests.support import golden_autoencoders as golden
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


PLAIN = [
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
