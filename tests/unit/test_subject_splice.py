"""Capture and splice at a site of a small random subject."""

import functools

import jax
import numpy as np
import pytest

from sae_jax import errors
from sae_jax.subject import capture, splice, transformer

CONFIG = transformer.TransformerConfig(
  n_layers=3,
  d_model=32,
  n_heads=4,
  n_kv_heads=2,
  d_head=8,
  d_ff=48,
  vocab_size=61,
  rope_base=1e4,
  norm_eps=1e-5,
  rope_pairs='interleaved',
)
SITES = [capture.Site(i, 'resid_post') for i in range(CONFIG.n_layers)]
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 12))
forward = jax.jit(transformer.forward, static_argnums=0)
run_capture = jax.jit(capture.capture, static_argnums=(0, 3))
run_resume = jax.jit(splice.resume, static_argnums=(0, 3))
run_splice = jax.jit(splice.splice, static_argnums=(0, 3, 4))


@functools.cache
def params():
  return transformer.init(CONFIG, jax.random.key(0))


@functools.cache
def logits():
  return np.asarray(forward(CONFIG, params(), TOKENS))


def identity(resid_BTD):
  return resid_BTD


def nudged(resid_BTD):
  return resid_BTD * 1.01


@pytest.mark.parametrize('site', SITES, ids=str)
def test_the_identity_changes_no_bit(site):
  spliced = run_splice(CONFIG, params(), TOKENS, site, identity)
  np.testing.assert_array_equal(spliced, logits())
  resid_BTD = run_capture(CONFIG, params(), TOKENS, site)
  resumed = run_resume(CONFIG, params(), resid_BTD, site)
  np.testing.assert_array_equal(resumed, logits())
  # Outside jit the ends of the model are compiled apart.
  eager = splice.splice(CONFIG, params(), TOKENS, site, identity)
  np.testing.assert_allclose(eager, logits(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('site', SITES, ids=str)
def test_another_replacement_shows(site):
  def negated(resid_BTD):
    return -resid_BTD

  spliced = run_splice(CONFIG, params(), TOKENS, site, negated)
  assert np.abs(spliced - logits()).max() > 0.1
  if site == SITES[-1]:
    np.testing.assert_allclose(spliced, -logits(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('site', SITES, ids=str)
def test_a_splice_changes_nothing_before_its_position(site):
  def at_seven(resid_BTD):
    return resid_BTD.at[:, 7].add(1.0)

  spliced = np.asarray(run_splice(CONFIG, params(), TOKENS, site, at_seven))
  np.testing.assert_array_equal(spliced[:, :7], logits()[:, :7])
  changed_BT = np.abs(spliced - logits()).max(-1) > 1e-4
  assert changed_BT[:, 7].all()
  if site == SITES[-1]:
    # No attention is left to carry it on.
    assert not changed_BT[:, 8:].any()
  else:
    assert changed_BT[:, 8:].all()


@pytest.mark.parametrize('site', SITES, ids=str)
def test_activations_of_other_tokens_give_their_logits(site):
  other = TOKENS[::-1]
  patch_BTD = run_capture(CONFIG, params(), other, site)
  spliced = splice.splice(
    CONFIG, params(), TOKENS, site, lambda resid_BTD: patch_BTD
  )
  expected = forward(CONFIG, params(), other)
  np.testing.assert_allclose(spliced, expected, rtol=1e-5, atol=1e-5)


def scaled_from(first_block):
  """Parameters whose blocks from `first_block` on differ."""
  blocks = jax.tree.map(
    lambda x: x.at[first_block:].multiply(2.0), params()['blocks']
  )
  return params() | {'blocks': blocks}


@pytest.mark.parametrize('site', SITES, ids=str)
def test_a_site_is_after_its_block_and_before_the_next(site):
  resid_BTD = run_capture(CONFIG, params(), TOKENS, site)
  later = run_capture(CONFIG, scaled_from(site.block + 1), TOKENS, site)
  np.testing.assert_array_equal(later, resid_BTD)
  own = run_capture(CONFIG, scaled_from(site.block), TOKENS, site)
  assert np.abs(own - resid_BTD).max() > 0.1


def test_a_nudge_follows_the_gradient():
  site = SITES[0]
  resid_BTD = run_capture(CONFIG, params(), TOKENS, site)

  def loss(resid_BTD):
    return jax.nn.logsumexp(
      splice.resume(CONFIG, params(), resid_BTD, site), axis=-1
    ).sum()

  slope = jax.jit(jax.grad(loss))(resid_BTD)
  predicted = float((slope * (nudged(resid_BTD) - resid_BTD)).sum())
  back_and_forth = loss(resid_BTD * 1.01) - loss(resid_BTD * 0.99)
  np.testing.assert_allclose(back_and_forth / 2, predicted, rtol=0.02)


def test_site_names_round_trip():
  assert capture.parse_site('blocks.14.resid_post') == capture.Site(
    14, 'resid_post'
  )
  for site in SITES:
    assert capture.parse_site(str(site)) == site


@pytest.mark.parametrize(
  'text',
  [
    '',
    '14',
    'blocks.x.resid_post',
    'blocks.-1.resid_post',
    'blocks.1.mlp_outs',
    'blocks.1.resid_post.',
    'blocks.1.embed',
    'resid_post',
    ' blocks.1.resid_post',
  ],
)
def test_a_bad_site_is_refused(text):
  with pytest.raises(errors.UserError) as error:
    capture.parse_site(text)
  assert str(error.value) == (
    f'site {text!r} is not known: use blocks.N.KIND, as '
    'blocks.14.resid_post, KIND one of resid_pre, attn_in, q, k, v, z, '
    'attn_raw, attn_out, resid_mid, mlp_in, mlp_act, mlp_raw, mlp_out, '
    'resid_post; or embed, pos_embed, final_norm'
  )


def test_a_site_beyond_the_last_block_is_refused():
  site = capture.parse_site('blocks.3.resid_post')
  message = (
    'site blocks.3.resid_post is beyond the last block of this subject '
    '(3 blocks): use blocks.0.resid_post to blocks.2.resid_post'
  )
  resid_BTD = np.zeros((1, 2, CONFIG.d_model), np.float32)
  for attempt in (
    lambda: capture.capture(CONFIG, params(), TOKENS, site),
    lambda: splice.resume(CONFIG, params(), resid_BTD, site),
    lambda: splice.splice(CONFIG, params(), TOKENS, site, identity),
  ):
    with pytest.raises(errors.UserError) as error:
      attempt()
    assert str(error.value) == message
