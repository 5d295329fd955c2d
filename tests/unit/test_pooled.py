"""Pooled prompts against one forward pass each."""

import jax
import numpy as np
import pytest

from sae_jax import mesh as mesh_lib
from sae_jax.probing import pooled
from tests.support import probed

RNG = np.random.default_rng(0)
MAX_TOKENS = 20
# Empty, of one token, past one width of padding, past the limit; more than
# one batch of them.
COUNTS = [3, 0, 1, 17, 30, 2, 20, 9, 1, *RNG.choice([2, 3, 9, 17], 13)]
PROMPTS = [
  ' '.join(f'w{i}' for i in RNG.integers(1, probed.VOCABULARY, count))
  for count in COUNTS
]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  data = probed.write_store(str(tmp_path_factory.mktemp('made') / 'store'))
  return probed.make_trained(data)


@pytest.fixture(scope='module')
def tokens_first(trained):
  """Each prompt's activations, preprocessed in float64: a list of x_TD."""
  subject = probed.make_subject()
  out = []
  for prompt in PROMPTS:
    ids = [int(word[1:]) for word in prompt.split()][:MAX_TOKENS] or [0]
    # Filled up to one shape, and with another token than the code under test.
    tokens_BT = np.full((1, MAX_TOKENS), 7)
    tokens_BT[0, : len(ids)] = ids
    resid_BTD = probed.run_capture(
      subject.config, subject.params, tokens_BT, probed.SITE
    )
    out.append(probed.inputs(trained, resid_BTD[0, : len(ids)])[0])
  return out


def read(trained, pooling, prompts=PROMPTS, max_tokens=MAX_TOKENS, bos=''):
  mesh = mesh_lib.make_mesh(1, 1, jax.devices()[:1])
  return pooled.pool(
    pooled.on_mesh(trained, mesh),
    mesh,
    probed.make_subject(),
    str(probed.SITE),
    prompts,
    max_tokens,
    pooling,
    'test',
    bos,
  )


def pool(trained, pooling, prompts=PROMPTS):
  return read(trained, pooling, prompts).x_PD


def test_last_is_the_last_token(trained, tokens_first):
  want_PD = np.array([x_TD[-1] for x_TD in tokens_first])
  found_PD = pool(trained, 'last')
  assert found_PD.dtype == np.float32
  np.testing.assert_allclose(found_PD, want_PD, atol=2e-6)
  # Control: the last token of a prompt that was not cut.
  longer_PD = read(trained, 'last', max_tokens=30).x_PD
  changed_P = np.abs(longer_PD - want_PD).max(1) > 1e-3
  assert set(np.flatnonzero(changed_P)) == {
    i for i, count in enumerate(COUNTS) if count > MAX_TOKENS
  }


def test_mean_leaves_out_position_0(trained, tokens_first):
  want_PD = np.array(
    [x_TD[1:].mean(0) if len(x_TD) > 1 else x_TD[0] for x_TD in tokens_first]
  )
  found_PD = pool(trained, 'mean')
  np.testing.assert_allclose(found_PD, want_PD, atol=2e-6)
  # Control: with it, all prompts but those of one token differ.
  all_PD = np.array([x_TD.mean(0) for x_TD in tokens_first])
  differs_P = np.abs(found_PD - all_PD).max(1) > 1e-3
  np.testing.assert_array_equal(differs_P, np.array(COUNTS) > 1)


def test_the_company_of_other_prompts_does_not_matter(trained):
  found_PD = pool(trained, 'mean')
  order = RNG.permutation(len(PROMPTS))
  shuffled_PD = pool(trained, 'mean', [PROMPTS[i] for i in order])
  np.testing.assert_allclose(shuffled_PD, found_PD[order], atol=1e-6)
  few_PD = pool(trained, 'mean', PROMPTS[:3])
  np.testing.assert_allclose(few_PD, found_PD[:3], atol=1e-6)


def test_encoding_the_mean_is_the_mean_of_encodings(trained, tokens_first):
  sae = probed.wide(trained)
  want_PN = np.array(
    [
      ((x_TD - sae.b_pre_D) @ sae.w_enc_ND.T + sae.b_lat_N)[
        1 if len(x_TD) > 1 else 0 :
      ].mean(0)
      for x_TD in tokens_first
    ]
  )
  found_PN = pooled.pre_activations(
    trained, pool(trained, 'mean'), np.arange(trained.config.n_latents)
  )
  np.testing.assert_allclose(found_PN, want_PN, rtol=1e-4, atol=1e-4)
  # Before TopK and ReLU: negative ones are there.
  assert (found_PN < 0).any() and (found_PN != 0).all()
  few_PQ = pooled.pre_activations(
    trained, pool(trained, 'mean'), np.array([5, 2])
  )
  np.testing.assert_allclose(few_PQ, found_PN[:, [5, 2]], atol=1e-6)


@pytest.mark.parametrize('pooling', pooled.POOLING)
@pytest.mark.parametrize('activation', ['topk', 'relu'])
def test_codes_are_pooled_after_the_nonlinearity(
  data, tokens_first, pooling, activation
):
  trained = probed.make_trained(data, activation=activation)
  want_PN = []
  for x_TD in tokens_first:
    z_TN = probed.latents(trained, x_TD)
    is_pooled = (
      slice(len(x_TD) > 1, None) if pooling == 'mean' else slice(-1, None)
    )
    want_PN.append(z_TN[is_pooled].mean(0))
  codes_PN = read(trained, pooling).codes_PN
  np.testing.assert_allclose(codes_PN.toarray(), want_PN, atol=2e-6)
  # Control: before it, most are not 0.
  assert codes_PN.nnz < 0.9 * codes_PN.shape[0] * codes_PN.shape[1]


def test_prompts_begin_as_contexts_do(trained):
  bos, plain = [
    read(trained, 'last', prompts, bos=bos).x_PD
    for prompts, bos in ((['w3 w4', ''], 'w9'), (['w9 w3 w4', 'w9'], ''))
  ]
  np.testing.assert_array_equal(bos, plain)
  # Control: the prompts without it are others.
  assert (np.abs(pool(trained, 'last', ['w3 w4', '']) - bos) > 1e-3).any()
