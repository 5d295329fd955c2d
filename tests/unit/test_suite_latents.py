"""Evaluations of single latents: patterns, steering, structure."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import errors
from sae_jax.probing import steering as steering_lib
from sae_jax.probing.suite import context as context_lib
from sae_jax.probing.suite import figures
from sae_jax.probing.suite.evaluations import n2g, steering, structure
from tests.support import probed, suites


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return suites.write_store(str(tmp_path_factory.mktemp('suite') / 'store'))


def figure(evaluation, outcome, name, who='trained'):
  return figures.figure(evaluation.STATISTICS[name], outcome.samples[who])


def test_patterns_find_a_planted_latent(data, monkeypatch):
  """A latent that reads one token's embedding is explained by that token."""
  suites.shrink(
    monkeypatch, n2g, latents=40, tokens=10_000, examples=5, batch_contexts=8
  )
  trained = probed.make_trained(data)
  context = suites.context(trained, data, scored={'trained': trained})
  outcome = n2g.measure(context)
  got, other = (
    figure(n2g, outcome, 'f1', who).value for who in ('trained', n2g.OTHER)
  )
  assert got > other + 0.1
  table = outcome.tables['Patterns']
  assert table[0] == ['latent', 'patterns'] and len(table) > 5
  # On its own examples' text a pattern of a single token is never wrong there.
  sums = outcome.samples['trained'].sums
  assert (sums['precision'] <= 1).all() and (sums['recall'] <= 1).all()


def test_latents_too_rare_to_explain_are_an_answer(data, monkeypatch):
  trained = probed.make_trained(data)
  sae = trained.sae.replace(b_lat_N=trained.sae.b_lat_N - 100)
  silent = dataclasses.replace(trained, sae=sae)
  context = suites.context(silent, data, scored={'trained': silent})
  suites.shrink(monkeypatch, n2g, latents=4, tokens=500, examples=5)
  with pytest.raises(context_lib.CannotMeasure, match='0 latents fire on 5'):
    n2g.measure(context)


def test_steering_moves_what_a_latent_votes_for(data, trained, monkeypatch):
  suites.shrink(
    monkeypatch, steering, latents=3, prompts=3, prompt_tokens=4, new_tokens=4
  )
  context = suites.context(trained, data)
  outcome = steering.measure(context)
  votes = {
    who: np.array(figure(steering, outcome, 'votes', who).value)
    for who in outcome.samples
  }
  # The first strengths: far beyond, all is noise in a subject at random.
  assert (votes['trained'] > 0).all() and (votes[steering.WRONG] < 0).all()
  assert (votes['trained'] > votes[steering.OTHER]).all()
  assert (votes['trained'] > votes[steering.NOISE]).all()
  kl = figure(steering, outcome, 'kl').value
  assert (np.diff(kl) > 0).all()


def test_steering_adds_at_the_scale_of_each_token(data, trained):
  raw_BD = data.read_rows(0, 6)
  latent = 3
  row_D = np.asarray(trained.sae.w_dec_ND)[latent]
  push = steering_lib.push(trained.config, trained.sae, 2 * row_D[None])
  got = steering_lib.apply(push, jnp.asarray(raw_BD)[None])[0]
  _, (_, scale_B1) = probed.inputs(trained, raw_BD)
  np.testing.assert_allclose(got, raw_BD + 2 * scale_B1 * row_D, rtol=1e-4)


def test_the_subject_writes_on_while_it_is_steered(data, trained):
  subject = probed.make_subject()
  prompts = ['w1 w2 w3', 'w4']
  plain, held = (
    steering_lib.steer(subject, trained, {3: strength}, prompts, n_new=6)
    for strength in (0.0, 50.0)
  )
  assert [len(text.split()) for text in plain + held] == [6] * 4
  assert plain != held
  # Without a strength it writes what it writes, whatever the latent.
  assert plain == steering_lib.steer(subject, trained, {5: 0}, prompts, n_new=6)
  # The first new token is drawn before any is steered.
  assert [t.split()[0] for t in plain] == [t.split()[0] for t in held]
  with pytest.raises(errors.UserError, match='no latent 24: give 0 to 23'):
    steering_lib.steer(subject, trained, {24: 1}, 'w1')
  other = dataclasses.replace(subject, weights_sha256='b' * 64)
  with pytest.raises(errors.UserError, match='was trained on made'):
    steering_lib.steer(other, trained, {1: 1}, 'w1')


def test_a_shuffled_copy_shares_every_latent(data, trained):
  """And one whose encoder is another's shares hardly any."""
  rng = np.random.default_rng(0)
  order, other = rng.permutation(24), rng.permutation(24)
  sae = trained.sae
  copy = dataclasses.replace(
    trained,
    sae=sae.replace(
      w_enc_ND=sae.w_enc_ND[order],
      w_dec_ND=sae.w_dec_ND[order],
      b_lat_N=sae.b_lat_N[order],
    ),
  )
  mixed = dataclasses.replace(
    copy, sae=copy.sae.replace(w_enc_ND=sae.w_enc_ND[other])
  )
  scored = {'trained': trained, 'copy': copy, 'mixed': mixed}
  outcome = structure.measure(suites.context(trained, data, scored=scored))
  for name in ('mmcs', 'pw_mcc', 'shared'):
    assert figure(structure, outcome, name, 'copy').value == pytest.approx(1)
  assert figure(structure, outcome, 'shared', 'mixed').value < 0.3
  assert figure(structure, outcome, 'pw_mcc', 'mixed').value == pytest.approx(1)
  assert figure(structure, outcome, 'pw_mcc').value is None
  assert not outcome.remarks
  rows = np.asarray(sae.w_dec_ND, np.float64)
  cosines = rows @ rows.T - 2 * np.eye(24)
  got = figure(structure, outcome, 'nearest')
  assert got.value == pytest.approx(cosines.max(1).mean(), abs=1e-5)


def test_a_site_without_logits_is_not_steered(data, trained, monkeypatch):
  context = suites.context(trained, data)
  monkeypatch.setattr(context.store, 'site', 'blocks.0.q')
  with pytest.raises(context_lib.CannotMeasure, match='have no votes'):
    steering.measure(context)
