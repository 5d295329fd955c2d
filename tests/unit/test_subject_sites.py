"""Sites: their names, reading several in one pass, replacing them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import errors
from sae_jax.subject import capture, sites, splice, transformer
from tests.support.subject_models import (
  CONFIGS,
  GEMMA,
  GPT2,
  LLAMA,
  params_of,
  TOKENS,
)

forward = jax.jit(transformer.forward, static_argnums=0)
capture_many = jax.jit(capture.capture_many, static_argnums=(0, 3))
splice_many = jax.jit(
  lambda config, params, edits: splice.splice_many(
    config, params, TOKENS, dict(edits)
  ),
  static_argnums=(0, 2),
)


def all_sites(config):
  known = [capture.Site(None, name) for name in sites.WHOLE]
  known += [capture.Site(b, k) for b in range(3) for k in sites.KINDS]
  return tuple(site for site in known if is_in(config, site))


def is_in(config, site):
  try:
    capture.check_site(config, site)
  except errors.UserError:
    return False
  return True


@functools.cache
def everything(family):
  config = CONFIGS[family]
  captured = capture_many(config, params_of(family), TOKENS, all_sites(config))
  return {name: np.asarray(x) for name, x in captured.items()}


@pytest.mark.parametrize('family', CONFIGS)
def test_the_sites_fit_together(family):
  config, x = CONFIGS[family], everything(family)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  start = x['embed'] + (x['pos_embed'] if family == 'gpt2' else 0)
  for i in range(3):
    at = {kind: x.get(f'blocks.{i}.{kind}') for kind in sites.KINDS}
    close(at['resid_pre'], start)
    middle = at['resid_pre'] + at['attn_out']
    if not config.parallel:
      close(at['resid_mid'], middle)
    close(at['resid_post'], middle + at['mlp_out'])
    weights = {k: v[i] for k, v in params_of(family)['blocks'].items()}
    close(
      at['attn_raw'],
      at['z'] @ weights['attn_out'],
    )
    close(at['mlp_raw'], at['mlp_act'] @ weights['down'])
    close(
      at['v'] - weights.get('value_bias', 0), at['attn_in'] @ weights['value']
    )
    same = np.allclose(at['attn_raw'], at['attn_out'], atol=1e-3)
    assert same != config.post_norms
    start = at['resid_post']
  for site in all_sites(config):
    assert x[str(site)].shape == (2, 9, capture.width(config, site))
  logits = forward(config, params_of(family), TOKENS)
  close(transformer.project(config, params_of(family), x['final_norm']), logits)


@pytest.mark.parametrize(
  'names',
  [
    ('embed',),
    ('blocks.0.resid_pre',),
    ('blocks.2.resid_pre', 'blocks.1.mlp_out', 'embed'),
    ('blocks.0.resid_post', 'blocks.1.resid_post', 'blocks.2.resid_post'),
    ('blocks.2.z', 'blocks.0.resid_post', 'blocks.2.resid_post'),
    ('final_norm', 'blocks.2.resid_post'),
  ],
  ids=lambda x: ' '.join(x),
)
def test_several_in_one_pass_are_each_alone(names):
  captured = capture_many(GEMMA, params_of('gemma'), TOKENS, names)
  assert set(captured) == set(names)
  for name in names:
    np.testing.assert_allclose(
      captured[name], everything('gemma')[name], rtol=1e-5, atol=1e-5
    )


def poisoned_from(block):
  """Parameters that make everything after these blocks not finite."""
  params = params_of('llama')
  blocks = {k: np.array(v) for k, v in params['blocks'].items()}
  for values in blocks.values():
    values[block:] = np.nan
  return params | {'blocks': blocks}


def test_a_pass_ends_at_the_last_site():
  for names, n_blocks in (
    (('embed', 'blocks.0.resid_pre'), 0),
    (('blocks.1.resid_pre',), 1),
    (('blocks.1.attn_in', 'blocks.0.resid_post'), 2),
    (('blocks.2.resid_post', 'embed'), 3),
    (('final_norm',), 3),
  ):
    parsed = [capture.parse_site(name) for name in names]
    assert capture._blocks_to_run(LLAMA, parsed) == n_blocks
  # A fence of poison that the pass must not reach, and one that it does.
  names = ('blocks.1.resid_pre', 'blocks.0.mlp_out')
  clean = capture_many(LLAMA, poisoned_from(1), TOKENS, names)
  assert all(np.isfinite(x).all() for x in clean.values())
  reached = capture_many(LLAMA, poisoned_from(0), TOKENS, names)
  assert not any(np.isfinite(x).all() for x in reached.values())


def test_blocks_alike_are_one_loop():
  def loops(*names):
    traced = capture_many.trace(LLAMA, params_of('llama'), TOKENS, names)
    lowered = traced.lower(lowering_platforms=('tpu',))
    return lowered.as_text().count('stablehlo.while')

  assert loops('blocks.2.resid_post') == 1
  assert loops(*(f'blocks.{i}.resid_post' for i in range(3))) == 1
  assert loops('blocks.0.resid_post', 'blocks.2.resid_post') == 2
  # Before, the block itself, and nothing after.
  assert loops('blocks.2.mlp_out') == 2


def halved(x):
  return 0.5 * x


@pytest.mark.parametrize('family', ['gemma', 'gpt2'])
def test_every_site_can_be_replaced(family):
  config, params = CONFIGS[family], params_of(family)
  logits = np.asarray(forward(config, params, TOKENS))
  whole = [site for site in all_sites(config) if site.block in (None, 1)]
  run = jax.jit(
    lambda params, on: splice.splice_many(
      config,
      params,
      TOKENS,
      {
        site: functools.partial(
          lambda i, x: jnp.where(on == i, jnp.roll(x, 1, -1), x), i
        )
        for i, site in enumerate(whole)
      },
    )
  )
  same = run(params, -1)
  np.testing.assert_allclose(same, logits, rtol=1e-5, atol=1e-5)
  for i, site in enumerate(whole):
    changed = np.abs(np.asarray(run(params, i)) - logits).max()
    assert changed > 1e-3, site


def test_replacing_the_parts_is_replacing_their_sum():
  params = params_of('llama')
  site = functools.partial(capture.Site, 2)
  parts = tuple(
    (site(kind), jnp.zeros_like) for kind in ('attn_out', 'mlp_out')
  )
  before = everything('llama')['blocks.2.resid_pre']
  whole = ((site('resid_post'), lambda x: jnp.asarray(before)),)
  expected = splice_many(LLAMA, params, whole)
  np.testing.assert_allclose(
    splice_many(LLAMA, params, parts), expected, rtol=1e-5, atol=1e-5
  )
  # One of them alone is another model.
  other = splice_many(LLAMA, params, parts[:1])
  assert np.abs(other - expected).max() > 0.01


def test_what_is_recorded_where_it_is_replaced_is_the_replacement():
  edited = (capture.Site(1, 'mlp_out'), capture.Site(1, 'resid_post'))

  @functools.partial(jax.jit, static_argnums=1)
  def run(params, site):
    record = [site, capture.Site(0, 'resid_post')]
    out = capture.run(
      LLAMA, params, TOKENS, record=record, edits={site: halved}
    )
    return out.recorded[site]

  for site in edited:
    np.testing.assert_allclose(
      run(params_of('llama'), site),
      0.5 * everything('llama')[str(site)],
      rtol=1e-5,
      atol=1e-5,
    )


@pytest.mark.parametrize(
  'text, site',
  [
    ('blocks.8.hook_resid_post', 'blocks.8.resid_post'),
    ('blocks.8.hook_resid_mid', 'blocks.8.resid_mid'),
    ('blocks.8.hook_mlp_out', 'blocks.8.mlp_out'),
    ('blocks.8.attn.hook_z', 'blocks.8.z'),
    ('blocks.8.mlp.hook_post', 'blocks.8.mlp_act'),
    ('hook_embed', 'embed'),
    ('hook_pos_embed', 'pos_embed'),
    ('model.layers.8', 'blocks.8.resid_post'),
    ('layers.8', 'blocks.8.resid_post'),
    ('transformer.h.8', 'blocks.8.resid_post'),
    ('gpt_neox.layers.8', 'blocks.8.resid_post'),
    ('model.language_model.layers.8', 'blocks.8.resid_post'),
    ('model.layers.8.self_attn', 'blocks.8.attn_raw'),
    ('transformer.h.8.attn', 'blocks.8.attn_raw'),
    ('gpt_neox.layers.8.attention.dense', 'blocks.8.attn_raw'),
    ('model.layers.8.mlp', 'blocks.8.mlp_raw'),
    ('model.layers.8.input_layernorm', 'blocks.8.attn_in'),
    ('transformer.h.8.ln_2', 'blocks.8.mlp_in'),
    ('model.layers.8.post_feedforward_layernorm', 'blocks.8.mlp_out'),
    ('model.embed_tokens', 'embed'),
    ('transformer.wte', 'embed'),
    ('transformer.wpe', 'pos_embed'),
    ('gpt_neox.embed_in', 'embed'),
    ('model.norm', 'final_norm'),
    ('transformer.ln_f', 'final_norm'),
  ],
)
def test_other_names_are_accepted(text, site):
  assert str(capture.parse_site(text)) == site
  # A site's own name is itself.
  assert str(capture.parse_site(site)) == site


@pytest.mark.parametrize(
  'text',
  [
    'blocks.8.ln1.hook_normalized',
    'blocks.8.hook_resid',
    'model.layers.8.rotary_emb',
    'model.layers',
    'norm',
    'blocks.8.self_attn',
    'transformer.h.8.hook_resid_post',
  ],
)
def test_names_without_one_meaning_are_refused(text):
  with pytest.raises(errors.UserError, match='is not known: use blocks'):
    capture.parse_site(text)


def test_a_name_that_hangs_on_the_family():
  text = 'model.layers.8.post_attention_layernorm'
  assert capture.parse_site(text, LLAMA) == capture.Site(8, 'mlp_in')
  assert capture.parse_site(text, GEMMA) == capture.Site(8, 'attn_out')
  with pytest.raises(errors.UserError) as error:
    capture.parse_site(text)
  assert str(error.value) == (
    f'site {text!r} is one thing in Gemma 2 and 3, another elsewhere: use '
    'blocks.8.attn_out or blocks.8.mlp_in'
  )


@pytest.mark.parametrize(
  'family, name, message',
  [
    ('llama', 'blocks.3.z', 'is beyond the last block of this subject (3 '),
    ('llama', 'pos_embed', 'whose positions are rotary: use embed'),
    ('neox', 'blocks.1.resid_mid', 'are parallel: use blocks.1.resid_pre'),
  ],
)
def test_a_site_that_a_subject_lacks_is_refused(family, name, message):
  with pytest.raises(errors.UserError) as error:
    capture_many(CONFIGS[family], params_of(family), TOKENS, (name,))
  assert message in str(error.value)


def test_a_pass_cannot_go_on_from_within_a_block():
  with pytest.raises(errors.UserError) as error:
    splice.resume(LLAMA, params_of('llama'), None, capture.Site(1, 'mlp_out'))
  assert str(error.value) == (
    'a pass cannot go on from blocks.1.mlp_out alone: use a resid_post, or '
    'splice.splice, which runs the whole'
  )


def test_more_tokens_than_positions_are_refused():
  tokens = np.zeros((1, 17), np.int32)
  with pytest.raises(errors.UserError) as error:
    transformer.forward(GPT2, params_of('gpt2'), tokens)
  assert str(error.value) == (
    '17 tokens are more than the 16 positions of this subject: use shorter '
    'sequences'
  )


def test_names_of_transformerlens():
  """What it has a name for, and no other text."""
  named = []
  for site in all_sites(GEMMA):
    name = sites.lens_name(str(site))
    assert capture.parse_site(name, GEMMA) == site
    named += [name] * (name != str(site))
  assert 'blocks.1.hook_resid_post' in named and 'hook_embed' in named
  assert len(named) == 3 * 10 + 1
  for text in ('model.layers.3', 'blocks.1.mlp_in', 'blocks.x.resid_mid', ''):
    assert sites.lens_name(text) == text
