"""Explanations in place of latents, beside passes of one context at a time."""

import jax
import numpy as np
import pytest

from sae_jax.probing.suite import context as context_lib
from sae_jax.probing.suite import explained, figures
from sae_jax.probing.suite.evaluations import simulated
from sae_jax.subject import splice
from tests.support import probed, suites


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return suites.write_store(str(tmp_path_factory.mktemp('suite') / 'store'))


def figure(outcome, name, who='trained'):
  sample = outcome.samples[who]
  return figures.figure(simulated.STATISTICS[name], sample).value


def made(trained, context, guess):
  """Two latents of each draw, whose patterns are what they predict, [C, T]."""
  texts = context.texts(60, 'n2g')
  latents = np.array([1, 2, 3, 4, 6, 7, 8, 9, 10, 11])
  true = []
  for latent in latents:
    values = np.zeros(texts.tokens_CT.shape)
    for row, length in enumerate(texts.length_C):
      raw_TD = probed.residuals(texts.tokens_CT[row, :length])
      x_TD, _ = probed.inputs(trained, raw_TD)
      values[row, :length] = probed.latents(trained, x_TD)[:, latent]
    true.append(np.where(texts.kept_CT, values, 0))
  firing = [(np.flatnonzero(of), of[of > 0]) for of in true]
  patterns = [guess(of) for of in true]
  draws = np.repeat(np.arange(5), 2)
  return explained.Explained(latents, draws, patterns, texts, firing)


@pytest.fixture
def measured(data, monkeypatch):
  """Measures an autoencoder whose explanations are made of the truth."""
  monkeypatch.setattr(
    explained.patterns_lib, 'predictions', lambda patterns, *_: patterns
  )
  suites.shrink(
    monkeypatch, simulated, latents=2, tokens=60, examples=2, contexts=100
  )

  def measure(trained, guess):
    context = suites.context(trained, data, scored={'trained': trained})
    own = made(trained, context, guess)
    monkeypatch.setattr(explained, 'of', lambda *_: {'trained': own})
    return simulated.measure(context), own, context

  return measure


def test_what_is_exact_costs_nothing_and_nothing_gives_nothing(data, measured):
  trained = probed.make_trained(data)
  exact, _, _ = measured(trained, lambda true: true)
  for what in ('ce', 'fvu'):
    assert figure(exact, f'{what}_given_back') == pytest.approx(1, abs=1e-3)
  assert figure(exact, 'delta_ce') == pytest.approx(0, abs=1e-6)
  assert abs(figure(exact, 'fvu_without')) > 1e-3
  # What another latent's explanation says is not what this one does.
  other = figure(exact, 'fvu_given_back', simulated.OTHER)
  assert abs(other - 1) > 0.1
  silent, _, _ = measured(trained, np.zeros_like)
  for what in ('ce', 'fvu'):
    assert figure(silent, f'{what}_given_back') == pytest.approx(0, abs=1e-6)
  assert figure(silent, 'fvu') == figure(silent, 'fvu_without')


@jax.jit
def spliced(tokens_1T, new_1TD):
  subject = probed.make_subject()
  return splice.splice(
    subject.config, subject.params, tokens_1T, probed.SITE, lambda _: new_1TD
  )


def logits_with(tokens_T, new_TD):
  """Of one context, padded to one length: what follows changes nothing."""
  short = probed.CONTEXT - len(tokens_T)
  logits = spliced(
    np.pad(tokens_T, (0, short))[None],
    np.pad(np.float32(new_TD), ((0, short), (0, 0)))[None],
  )
  return logits[0, : len(tokens_T)]


def slow(trained, own, context):
  """Sums over all contexts where something changes, in float64 where it can."""
  mean_D = np.float64(context.mean('trained'))
  sums = dict.fromkeys(
    ('base', 'without', 'said', 'variance', 'predictions'), 0
  )
  ces = dict.fromkeys(('base', 'without', 'said'), 0)
  for draw in range(5):
    places = np.flatnonzero(own.draw_U == draw)
    every = [own.activations(place) for place in places]
    # As the next latent's would be predicted too, where it is measured.
    others = [own.patterns[(place + 1) % 10] for place in places]
    guesses = [own.patterns[place] for place in places]
    touched = sum(of > 0 for of in (*every, *others, *guesses)).any(1)
    for row in np.flatnonzero(touched):
      length = own.texts.length_C[row]
      tokens_T = own.texts.tokens_CT[row, :length]
      kept_T = own.texts.kept_CT[row, :length]
      raw_TD = probed.residuals(tokens_T)
      x_TD, (shift, scale) = probed.inputs(trained, raw_TD)
      z_TN = probed.latents(trained, x_TD)
      out = {'base': z_TN.copy(), 'without': z_TN.copy(), 'said': z_TN.copy()}
      for place, guess in zip(places, guesses):
        out['without'][:, own.latents[place]] = 0
        out['said'][:, own.latents[place]] = guess[row, :length]
      sums['variance'] += ((x_TD - mean_D) ** 2)[kept_T].sum()
      sums['predictions'] += length - 1
      for kind, codes_TN in out.items():
        new_TD = probed.decoded(trained, codes_TN)
        sums[kind] += ((x_TD - new_TD) ** 2)[kept_T].sum()
        mixed_TD = np.where(kept_T[:, None], new_TD * scale + shift, raw_TD)
        logits = np.float64(logits_with(tokens_T, mixed_TD))
        peak = logits.max(1, keepdims=True)
        log_p = (
          logits - peak - np.log(np.exp(logits - peak).sum(1, keepdims=True))
        )
        ces[kind] -= log_p[np.arange(length - 1), tokens_T[1:]].sum()
  return sums, ces


@pytest.mark.parametrize(
  ('activation', 'preprocessing'),
  [('topk', 'center_unit_norm'), ('relu', 'none')],
)
def test_costs_are_those_of_their_definition(
  data, measured, activation, preprocessing
):
  trained = probed.make_trained(
    data, activation=activation, preprocessing=preprocessing
  )
  outcome, own, context = measured(trained, lambda true: 0.6 * true + 0.1)
  sums, ces = slow(trained, own, context)
  for kind, name in (('said', ''), ('without', '_without')):
    fvu = (sums[kind] - sums['base']) / sums['variance']
    assert figure(outcome, f'fvu{name}') == pytest.approx(fvu, rel=1e-3)
    delta = (ces[kind] - ces['base']) / sums['predictions']
    got = figure(outcome, f'delta_ce{name}')
    assert got == pytest.approx(delta, rel=0.02, abs=1e-5)


def test_latents_without_any_trace_are_an_answer(data, measured, monkeypatch):
  trained = probed.make_trained(data)
  own = explained.Explained.activations
  monkeypatch.setattr(
    explained.Explained,
    'activations',
    lambda self, place: 0 * own(self, place),
  )
  with pytest.raises(context_lib.CannotMeasure, match='neither fire nor are'):
    measured(trained, np.zeros_like)
