"""Votes at every kind of site against slopes of the subject's own logits."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from sae_jax import subject as subject_lib
from sae_jax.probing import lens
from sae_jax.subject import capture, logit_lens, transformer
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
  tied=True,
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


def _frozen(rsqrt):
  return lambda x: jax.lax.stop_gradient(rsqrt(x))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _slopes(config, site, freeze, params, tokens_BT, rows_NJ):
  def logits(step, row_J):
    edits = {site: lambda x: x + step * row_J}
    out = capture.run(config, params, tokens_BT, edits=edits, logits=True)
    return out.logits_BTV

  def along(row_J):
    return jax.jvp(lambda s: logits(s, row_J), (0.0,), (1.0,))[1]

  rsqrt = jax.lax.rsqrt
  with mock.patch.object(jax.lax, 'rsqrt', _frozen(rsqrt) if freeze else rsqrt):
    return jax.vmap(along)(rows_NJ)


def slopes(subject, site, rows_NJ, freeze=True):
  """How the subject's own logits rise along rows, at each of some tokens.

  Args:
    subject: the model.
    site: where the rows are added.
    rows_NJ: the rows.
    freeze: whether norms keep the scales that they have without the rows.
  """
  tokens_BT = np.random.default_rng(5).integers(0, VOCABULARY, (2, 7))
  return np.asarray(
    _slopes(
      subject.config,
      site,
      freeze,
      subject.params,
      tokens_BT.astype(np.int32),
      rows_NJ,
    )
  )


def rows_at(subject, site, count=3):
  """Rows with a mean of their own, which a layer norm takes out."""
  shape = count, capture.width(subject.config, site)
  return np.float32(np.random.default_rng(6).standard_normal(shape) + 1)


def direction(logits_V):
  """Logits without their mean and scale, which the norms of a token set."""
  logits_V = np.float64(logits_V)
  logits_V -= logits_V.mean(-1, keepdims=True)
  return logits_V / np.linalg.norm(logits_V, axis=-1, keepdims=True)


def distance(subject, site, freeze=True, **changes):
  """How far the lens is at most from the slopes; 2 is the other way round.

  Args:
    subject: the model.
    site: where the rows are.
    freeze: see `slopes`.
    **changes: fields of the lens that are put in.
  """
  lens_of = logit_lens.lens(subject.config, subject.params, site)
  rows_NJ = rows_at(subject, site)
  logits_NV = logit_lens.logits(lens_of.replace(**changes), rows_NJ)
  away = direction(slopes(subject, site, rows_NJ, freeze))
  away -= direction(logits_NV)[:, None, None]
  return np.linalg.norm(away, axis=-1).max()


# Site -> matrices on other ways from it to the logits than the straight one.
STRAIGHT = {
  'embed': ('attn_out', 'down'),
  'z': ('down',),
  'attn_raw': ('down',),
  'attn_out': ('down',),
  'mlp_act': (),
  'mlp_raw': (),
  'resid_post': (),
  'final_norm': (),
}


def site_named(name):
  return capture.Site(None if name in ('embed', 'final_norm') else 0, name)


def of_layer(*names):
  return [(name, LAYER) for name in names]


def of_gemma(*names):
  return [(name, GEMMA) for name in names]


@pytest.mark.parametrize(
  ('name', 'config'),
  of_layer('embed', 'z', 'attn_out', 'mlp_act', 'resid_post', 'final_norm')
  + of_gemma('z', 'attn_raw', 'mlp_act', 'mlp_raw'),
  ids=lambda value: value if isinstance(value, str) else value.norm,
)
def test_the_lens_is_the_slope_of_the_logits(name, config):
  subject = make_subject(config, STRAIGHT[name])
  assert distance(subject, site_named(name)) < 1e-5


def test_control_each_part_of_the_lens_is_needed():
  layer, gemma = make_subject(LAYER), make_subject(GEMMA)
  site = site_named('resid_post')
  assert distance(layer, site, centred=False) > 0.1
  assert distance(layer, site, final_norm_D=None) > 0.1
  assert distance(layer, site, unembed_VD=layer.params['embed']) > 0.1
  assert distance(gemma, site_named('mlp_raw'), post_norm_D=None) > 0.1


def test_control_the_scales_of_norms_must_be_frozen():
  subject = make_subject(LAYER)
  assert distance(subject, site_named('resid_post'), freeze=False) > 0.01


def voted(subject, site, rows_NJ):
  """The logits of all tokens, in the tokens' order."""
  ids, logits, down_ids, down = lens.votes(subject, site, rows_NJ, VOCABULARY)
  out = np.take_along_axis(logits, np.argsort(ids, axis=1), 1)
  # Down is the same list from its end.
  np.testing.assert_array_equal(
    np.take_along_axis(down, np.argsort(down_ids, axis=1), 1), out
  )
  return out


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_votes_are_the_logits_of_the_lens(dtype):
  subject = make_subject(GEMMA)
  params = jax.tree.map(lambda a: jnp.asarray(a, dtype), subject.params)
  subject = dataclasses.replace(subject, params=params)
  site = site_named('mlp_act')
  rows_NJ = rows_at(subject, site)

  def wide(array):
    return np.asarray(array, np.float64)

  out_ND = wide(rows_NJ) @ wide(params['blocks']['down'][0])
  out_ND *= wide(params['blocks']['ffn_post_norm'][0])
  out_ND *= wide(params['final_norm'])
  logits_NV = out_ND @ wide(params['embed']).T
  logits_NV -= logits_NV.mean(1, keepdims=True)
  np.testing.assert_allclose(
    voted(subject, site, rows_NJ),
    logits_NV,
    atol=1e-5 * np.abs(logits_NV).max(),
  )


def test_every_kind_of_site_has_votes_or_none():
  subject = make_subject(dataclasses.replace(LAYER, post_norms=True))
  kinds = subject_lib.sites.KINDS | subject_lib.sites.WHOLE
  for name in kinds:
    site = capture.Site(None if name in subject_lib.sites.WHOLE else 0, name)
    rows_ND = np.ones((2, capture.width(subject.config, site)), np.float32)
    rows_ND[1, ::2] = 3
    up_ids, up, down_ids, down = map(
      np.asarray, lens.votes(subject, site, rows_ND, 5)
    )
    shapes = {a.shape for a in (up_ids, up, down_ids, down)}
    assert shapes == {(2, 5)}
    if logit_lens.has_logits(site):
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
