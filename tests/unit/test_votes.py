"""Votes at every kind of site against slopes of the model's own logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from sae_jax import subject as subject_lib
from sae_jax.probing import lens
from sae_jax.subject import capture, transformer
from tests.support import probed

D_MODEL, VOCABULARY = 64, 80
LAYER = transformer.TransformerConfig(
  n_layers=1,
  d_model=D_MODEL,
  n_heads=4,
  n_kv_heads=2,
  d_head=8,
  d_ff=48,
  vocab_size=VOCABULARY,
  rope_base=1e4,
  norm_eps=1e-5,
  rope_pairs='half',
  n_positions=32,
  norm='layer',
  gated=False,
  activation='gelu',
  ffn_bias=True,
  attn_out_bias=True,
  tied=False,
)
GEMMA = dataclasses.replace(
  LAYER,
  n_positions=0,
  norm='rms',
  post_norms=True,
  gated=True,
  ffn_bias=False,
  attn_out_bias=False,
  final_softcap=50.0,
)


init = jax.jit(
  lambda config: transformer.init(config, jax.random.key(1)), static_argnums=0
)


def make_subject(config, zero=(), words=VOCABULARY):
  """A model whose norms and biases are of many sizes.

  Args:
    config: its shape.
    zero: matrices that write to the stream and are made zero.
    words: tokens of its tokenizer.
  """
  params = init(config)
  rng = np.random.default_rng(2)

  def vary(path, array):
    name = path[-1].key
    if name.endswith('norm'):
      return rng.uniform(0.3, 2, array.shape).astype(np.float32)
    if name.endswith('bias'):
      return rng.normal(0, 0.3, array.shape).astype(np.float32)
    return np.zeros_like(array) if name in zero else array

  params = jax.tree_util.tree_map_with_path(vary, params)
  vocabulary = {f'w{i}': i for i in range(words)}
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token='w0')
  )
  return subject_lib.Subject('made', config, params, tokenizer, 'a' * 64)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _slopes(config, site, params, tokens_BT, rows_ND):
  def logits(step, row_D):
    edits = {site: lambda x: x + step * row_D}
    out = capture.run(config, params, tokens_BT, edits=edits, logits=True)
    return out.logits_BTV, out.resid_BTD

  def along(row_D):
    step = (0.0,), (1.0,)
    (_, x_BTD), (slope_BTV, _) = jax.jvp(lambda s: logits(s, row_D), *step)
    if config.norm == 'layer':
      x_BTD -= x_BTD.mean(-1, keepdims=True)
    scale_BT1 = jnp.sqrt((x_BTD**2).mean(-1, keepdims=True) + config.norm_eps)
    scale_BT1 = 1.0 if site.name == 'final_norm' else scale_BT1
    return (slope_BTV * scale_BT1).mean((0, 1))

  return jax.vmap(along)(rows_ND)


def slopes(subject, site, rows_ND):
  """How each token's logit rises along rows, the last norm's scale undone."""
  tokens_BT = np.random.default_rng(5).integers(0, VOCABULARY, (8, 24))
  return np.asarray(
    _slopes(
      subject.config, site, subject.params, tokens_BT.astype(np.int32), rows_ND
    )
  )


def voted(subject, site, rows_ND):
  """The logits of all tokens, in the tokens' order."""
  ids, logits, down_ids, down = lens.votes(subject, site, rows_ND, VOCABULARY)
  out = np.take_along_axis(logits, np.argsort(ids, axis=1), 1)
  # Down is the same list from its end.
  np.testing.assert_allclose(
    np.take_along_axis(down, np.argsort(down_ids, axis=1), 1), out, rtol=1e-5
  )
  return out


def agreement(subject, site, shift=0.0):
  width = capture.width(subject.config, site)
  rows_ND = np.random.default_rng(6).standard_normal((3, width))
  rows_ND = (rows_ND + shift).astype(np.float32)
  pairs = zip(voted(subject, site, rows_ND), slopes(subject, site, rows_ND))
  return [np.corrcoef(*pair)[0, 1] for pair in pairs]


# Site -> matrices on other ways from it to the logits than the straight one.
STRAIGHT = {
  'embed': ('attn_out', 'down'),
  'z': ('down',),
  'mlp_act': (),
  'mlp_raw': (),
  'resid_post': (),
  'final_norm': (),
}


def site_named(name):
  return capture.Site(None if name in ('embed', 'final_norm') else 0, name)


@pytest.mark.parametrize(
  ('name', 'config'),
  [
    *((name, LAYER) for name in ('embed', 'mlp_act', 'resid_post')),
    *((name, GEMMA) for name in ('z', 'mlp_raw', 'final_norm')),
  ],
  ids=lambda value: value if isinstance(value, str) else value.norm,
)
def test_votes_are_the_slopes_of_the_logits(name, config):
  subject = make_subject(config, STRAIGHT[name])
  # Rows with a mean of their own, which a layer norm takes out.
  assert min(agreement(subject, site_named(name), shift=1.0)) > 0.97


def test_control_centre_and_weights_would_be_missed():
  subject = make_subject(LAYER)
  site = site_named('resid_post')
  rows = np.random.default_rng(6).standard_normal((3, D_MODEL)) + 1
  params = {
    k: np.asarray(v) for k, v in subject.params.items() if k != 'blocks'
  }
  for row_D, slope_V in zip(rows, slopes(subject, site, np.float32(rows))):
    bare_V = row_D @ params['unembed'].T
    scaled_V = (row_D * params['final_norm']) @ params['unembed'].T
    assert np.corrcoef(scaled_V, slope_V)[0, 1] < 0.95
    assert np.corrcoef(bare_V, slope_V)[0, 1] < 0.95


def test_every_kind_of_site_has_votes_or_none():
  subject = make_subject(dataclasses.replace(LAYER, post_norms=True))
  kinds = subject_lib.sites.KINDS | subject_lib.sites.WHOLE
  for name in kinds:
    site = capture.Site(None if name in subject_lib.sites.WHOLE else 0, name)
    rows_ND = np.ones((2, capture.width(subject.config, site)), np.float32)
    rows_ND[1, ::2] = 3
    # Each site's program would take longer to compile than to run.
    with jax.disable_jit():
      up_ids, up, down_ids, down = lens.votes(subject, site, rows_ND, 5)
    shapes = {a.shape for a in (up_ids, up, down_ids, down)}
    assert shapes == {(2, 5)}
    if lens.has_votes(site):
      assert up_ids.min() >= 0 and up[1, 0] > 0 > down[1, 0]
    else:
      assert (up_ids == -1).all() and (down_ids == -1).all()
      assert not up.any() and not down.any()
      assert name in ('attn_in', 'q', 'k', 'v', 'mlp_in')


def test_rows_without_a_token_take_no_part():
  plain = make_subject(LAYER)
  padded = make_subject(LAYER, words=70)
  rows_ND = np.random.default_rng(7).standard_normal((9, D_MODEL))
  rows_ND = rows_ND.astype(np.float32)
  site = site_named('resid_post')
  ids, logits, down_ids, down = lens.votes(padded, site, rows_ND, 100)
  assert ids.shape == (9, 70)
  assert ids.max() == down_ids.max() == 69
  # The mean that is taken off is that of the tokens alone.
  np.testing.assert_allclose(logits.mean(1), 0, atol=1e-5)
  np.testing.assert_allclose(down.mean(1), 0, atol=1e-5)
  # Control: the rows that are left out have votes where they are tokens.
  assert lens.votes(plain, site, rows_ND, 10)[0].max() > 69


def test_a_tokenizer_may_have_gaps_and_more_tokens_than_the_embedding():
  def tokens_of(vocabulary):
    tokenizer = tokenizers.Tokenizer(
      tokenizers.models.WordLevel(vocabulary, unk_token='0')
    )
    # No text gives it, so that it needs no row.
    tokenizer.add_special_tokens(['<end>'])
    tokenizer.encode_special_tokens = True
    subject = dataclasses.replace(make_subject(LAYER), tokenizer=tokenizer)
    return np.flatnonzero(lens.tokens_of(subject)).tolist()

  # A special token is numbered by how many there are.
  assert tokens_of({'0': 0, 'b': 5}) == [0, 2, 5]
  whole = {str(i): i for i in range(VOCABULARY)}
  assert tokens_of(whole) == list(range(VOCABULARY))
  assert len(lens.tokens_of(probed.make_subject())) == probed.VOCABULARY
