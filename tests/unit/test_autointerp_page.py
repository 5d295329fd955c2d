"""Explanations go to the page, which is built anew when there are others."""

import json

from sae_jax.browser import build, index
from sae_jax.features import explanations
from tests.support import synthetic_features

NONE = {'score': None, 'controls': {'other': None}}
LINES = [
  {
    'latent': 2,
    'explanation': 'two',
    'score': {'balanced_accuracy': [0.8, 0.7, 0.9]},
    'controls': {'other': None},
  },
  {'latent': 3, 'explanation': None, **NONE},
  {'latent': 5, 'explanation': 'five', **NONE},
]


def test_a_page_has_the_explanations_of_its_results(tmp_path, monkeypatch):
  features, report, vocabulary = synthetic_features.make(
    n_latents=12, n_examples=2, window=8, n_tokens=2000
  )
  report['made_from'] = {'sae_fingerprint': 'f'}
  probe, page = tmp_path / 'probe', tmp_path / 'page'
  synthetic_features.write_results(probe, {}, report, features)
  monkeypatch.setattr(build, 'vocabulary', lambda *_: vocabulary)

  def read():
    build.browse(index.BrowseConfig(), str(probe), str(page))
    return json.loads((page / 'data' / 'explanations.json').read_text())

  none = {'latents': [], 'texts': [], 'scores': [], 'others': []}
  assert read() == none
  before = (page / 'data' / 'meta.json').read_bytes()
  explanations.write(probe, LINES, {'sae_fingerprint': 'f'})
  assert read() == {
    'latents': [2, 5],
    'texts': ['two', 'five'],
    'scores': [[0.8, 0.7, 0.9], None],
    'others': [None, None],
  }
  after = (page / 'data' / 'meta.json').read_bytes()
  assert before != after
  read()
  assert (page / 'data' / 'meta.json').read_bytes() == after
  # Control: those of another autoencoder are left out.
  explanations.write(probe, LINES, {'sae_fingerprint': 'g'})
  assert read() == none
