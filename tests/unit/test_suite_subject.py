"""Evaluations that run the subject, beside passes of one context at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import errors
from sae_jax.probing import downstream as whole_downstream
from sae_jax.probing import splicing
from sae_jax.probing.suite import ablating, figures
from sae_jax.probing.suite.evaluations import (
  ablation,
  attribution,
  downstream,
  effects,
)
from sae_jax.subject import capture, splice
from tests.support import probed, reports, suites


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return suites.write_store(str(tmp_path_factory.mktemp('suite') / 'store'))


def figure(evaluation, outcome, name, who='trained'):
  return figures.figure(evaluation.STATISTICS[name], outcome.samples[who])


def logits_with(tokens_T, new_TD):
  subject = probed.make_subject()
  return splice.splice(
    subject.config,
    subject.params,
    np.asarray(tokens_T)[None],
    probed.SITE,
    lambda _: new_TD[None],
  )[0]


def test_downstream_is_that_of_the_report(data, trained, monkeypatch):
  """Of all contexts the figures are those that the report has."""
  suites.shrink(monkeypatch, downstream, tokens=10_000)
  context = suites.context(trained, data, scored={'trained': trained})
  outcome = downstream.measure(context)
  want = whole_downstream.measure(
    trained, probed.make_subject(), data, 10_000, context.mean_D
  )
  for name, field in (
    ('ce', 'ce'),
    ('delta_ce', 'delta_ce'),
    ('kl', 'kl'),
    ('recovered_zero', 'ce_recovered'),
    ('recovered_mean', 'ce_recovered_mean'),
  ):
    got = figure(downstream, outcome, name)
    assert got.value == pytest.approx(getattr(want, field), rel=1e-4)
  got = figure(downstream, outcome, 'delta_ce')
  assert got.low == pytest.approx(want.delta_ce_low, rel=1e-3)
  # Replacing all tokens is another thing, and positions sum to the whole.
  assert figure(downstream, outcome, 'delta_ce_all').value != pytest.approx(
    got.value, rel=1e-2
  )
  sums = {t: of.sum(0) for t, of in outcome.samples['trained'].sums.items()}
  assert sums['spliced_position'].sum() == pytest.approx(sums['spliced'])
  assert sums['count_position'].sum() == sums['predictions']


def test_a_loss_is_told_as_compute(data, trained, tmp_path, monkeypatch):
  """A decade for each nat: 10 to the power of minus delta CE."""
  path = tmp_path / 'curve.csv'
  path.write_text('compute,loss\n1e30,-20\n1e10,0\n1e-30,40\n')
  suites.shrink(monkeypatch, downstream, tokens=40)
  context = suites.context(
    trained, data, scored={'trained': trained}, loss_curve=str(path)
  )
  outcome = downstream.measure(context)
  sample = outcome.samples['trained']
  got = figures.figure(outcome.statistics['compute'], sample)
  delta = figure(downstream, outcome, 'delta_ce').value
  assert got.value == pytest.approx(10**-delta, rel=1e-6)
  assert got.low < got.value < got.high
  # Beyond the table there is no figure.
  path.write_text('compute,loss\n1,0.2\n2,0.1\n')
  outcome = downstream.measure(context)
  got = figures.figure(outcome.statistics['compute'], sample)
  assert got.value is None


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('', 'does not begin with the line compute,loss'),
    ('loss,compute\n1,2\n', 'does not begin with the line'),
    ('compute,loss\n1,a\n', 'a line that is not two numbers'),
    ('compute,loss\n1,2,3\n', 'a line that is not two numbers'),
    ('compute,loss\n1,2\n', '1 models'),
    ('compute,loss\n1,2\n2,3\n', 'do not all have less loss'),
    ('compute,loss\n0,3\n2,2\n', 'do not all have less loss'),
  ],
)
def test_a_loss_curve_that_is_none_is_refused(tmp_path, text, said):
  path = tmp_path / 'curve.csv'
  path.write_text(text)
  with pytest.raises(errors.UserError, match=said):
    reports.CONFIG.__class__(loss_curve=str(path))
  with pytest.raises(errors.UserError, match='cannot be read'):
    reports.CONFIG.__class__(loss_curve=str(tmp_path / 'none.csv'))


def test_an_ablation_takes_one_latent_out(data, trained):
  """Logits as of a pass whose activation lacks the latent's part."""
  context = suites.context(trained, data)
  drawn = context.tokens(2, 3, 'ablation')
  shape, sae = context.itself
  chance_C = np.linspace(0, 0.99, len(drawn.at_C), dtype=np.float32)
  ahead = np.arange(3)
  where = context.subject.config, context.site
  raw_BTD, logits = ablating.read(
    *where, context.params, drawn.tokens_CT, drawn.at_C[:, None] + ahead
  )
  taken, without = ablating.logits_without(
    ablating.active, *where, shape, context.params, sae, drawn.tokens_CT,
    raw_BTD, drawn.at_C, chance_C, drawn.at_C[:, None] + ahead,
  )  # fmt: skip
  for row, at in enumerate(drawn.at_C):
    raw_TD = np.asarray(raw_BTD[row], np.float64)
    x_BD, (_, scale) = probed.inputs(trained, raw_TD[at : at + 1])
    z_N = probed.latents(trained, x_BD)[0]
    active = np.argsort(-z_N, kind='stable')[: (z_N > 0).sum()]
    latent = active[int(chance_C[row] * len(active))]
    assert taken.idx_B[row] == latent
    new_TD = raw_TD.copy()
    new_TD[at] -= scale[0] * z_N[latent] * probed.wide(trained).w_dec_ND[latent]
    for values, activations in ((logits, raw_TD), (without, new_TD)):
      want = logits_with(drawn.tokens_CT[row], jnp.float32(activations))
      np.testing.assert_allclose(
        values[row], want[at + ahead], rtol=1e-3, atol=1e-4
      )
  # Several places among the active ones were taken.
  assert len(set(np.asarray(taken.idx_B).tolist())) > 3


@pytest.mark.parametrize(
  ('change', 'share'),
  [
    # One of 2 x 10 logits; two of them; half up and half down, of all.
    ({(0, 3): 1.0}, 1 / 20),
    ({(0, 3): -2.0, (1, 7): 2.0}, 2 / 20),
  ],
)
def test_the_share_of_logits_is_counted(change, share):
  change_SV = np.full((2, 10), 5.0, np.float32)
  for place, by in change.items():
    change_SV[place] += by
  got = ablation.affected(jnp.asarray(change_SV)[None])
  assert got[0] == pytest.approx(share)


def test_a_diffuse_effect_is_on_most_logits():
  rng = np.random.default_rng(0)
  wide = rng.standard_normal((1, 4, 1000)).astype(np.float32)
  # (E|x| / sqrt(E x^2))^2 of a normal distribution.
  assert ablation.affected(wide)[0] == pytest.approx(2 / np.pi, rel=0.05)
  assert ablation.affected(np.zeros((1, 4, 10), np.float32))[0] == 0


def test_attributions_are_small_effects(data, trained, monkeypatch):
  """As parts shrink, an ablation does what the gradient says of it."""
  suites.shrink(monkeypatch, attribution, ablations=8)
  correlations = []
  for scale in (1e-2, 1.0):
    small = dataclasses.replace(
      trained, sae=trained.sae.replace(w_dec_ND=trained.sae.w_dec_ND * scale)
    )
    context = suites.context(small, data, scored={'trained': small})
    outcome = attribution.measure(context)
    correlations.append(figure(attribution, outcome, 'attribution').value)
  assert correlations[0] > 0.999 > correlations[1]


def test_gradients_are_those_of_differences(data, trained):
  context = suites.context(trained, data)
  drawn = context.tokens(1, 1, 'attribution')
  where = context.subject.config, context.site, context.params
  raw_BTD, pair_B2, before_B, slope_BD = attribution.gradients(
    *where, drawn.tokens_CT, drawn.at_C
  )
  rng = np.random.default_rng(0)
  direction_D = rng.standard_normal(probed.D_MODEL).astype(np.float32)
  rows = np.arange(len(drawn.at_C))
  ends = []
  for step in (1e-2, -1e-2):
    moved_BTD = raw_BTD.at[rows, drawn.at_C].add(step * direction_D)
    logits_B1V = splicing.logits_at(
      *where[:2], context.params, drawn.tokens_CT, moved_BTD,
      drawn.at_C[:, None],
    )  # fmt: skip
    ends.append(attribution.difference(logits_B1V, pair_B2))
  np.testing.assert_allclose(
    (ends[0] - ends[1]) / 2e-2, slope_BD @ direction_D, rtol=2e-2, atol=2e-3
  )
  assert (np.asarray(before_B) > 0).all()


@pytest.mark.parametrize(
  'name', ['resid_pre', 'mlp_out', 'z', 'final_norm', 'resid_post']
)
def test_logits_at_some_positions_are_those_of_all(name):
  subject = probed.make_subject()
  site = capture.Site(None if name == 'final_norm' else 1, name)
  tokens_BT = np.random.default_rng(0).integers(0, 50, (2, 9)).astype(np.int32)
  raw_BTD = probed.run_capture(subject.config, subject.params, tokens_BT, site)
  new_BTD = raw_BTD * 1.1
  at_BS = np.array([[0, 4], [8, 2]])
  got = jax.jit(splicing.logits_at, static_argnums=(0, 1))(
    subject.config, site, subject.params, tokens_BT, new_BTD, at_BS
  )
  want = jax.jit(splice.splice, static_argnums=(0, 3, 4))(
    subject.config, subject.params, tokens_BT, site, lambda _: new_BTD
  )
  for row in range(2):
    np.testing.assert_allclose(
      got[row], want[row, at_BS[row]], rtol=2e-5, atol=2e-5
    )


def test_effects_are_those_of_passes_without_the_latent(
  data, trained, monkeypatch
):
  """On top examples: losses, KL and votes, worked out text by text."""
  monkeypatch.setattr(effects, 'TOKENS', 3)
  suites.shrink(monkeypatch, effects, latents=2, examples=2, batch_latents=3)
  rows = np.arange(data.n_train)
  x_BD, (_, scale_B1) = probed.inputs(trained, data.read_rows(0, data.n_train))
  z_BN = probed.latents(trained, x_BD)
  w_dec_ND = probed.wide(trained).w_dec_ND

  def top_rows(latents):
    order = np.argsort(-z_BN[:, latents], 0, kind='stable')[:3].T
    return np.where(
      np.take_along_axis(z_BN.T[latents], order, 1) > 0, order, -1
    )

  context = suites.context(
    trained, data, top_rows=top_rows, counts_N=(z_BN > 0).sum(0)
  )
  outcome = effects.measure(context)
  drawn = outcome.samples['trained'].unit_U
  columns = outcome.columns
  assert set(np.flatnonzero(np.isfinite(columns['effect_kl']))) == set(drawn)
  positions, tokens = data.positions(), data.tokens()
  for latent in drawn[:4]:
    losses, divergences, changes = [], [], []
    for row in top_rows(np.array([latent]))[0, :2]:
      if row < 0:
        continue
      place = data.stream_index()[rows[row]]
      at = positions[place]
      first = place - at
      ends = np.flatnonzero(positions[first + 1 :] == 0)
      length = int(ends[0]) + 1 if len(ends) else len(tokens) - first
      text = np.zeros(probed.CONTEXT, np.int32)
      text[:length] = tokens[first : first + length]
      raw_TD = probed.residuals(text)
      new_TD = raw_TD.astype(np.float64)
      new_TD[at] -= scale_B1[row] * z_BN[row, latent] * w_dec_ND[latent]
      before, after = (
        np.float64(jax.nn.log_softmax(logits_with(text, jnp.float32(of))))
        for of in (raw_TD, new_TD)
      )
      stop = min(at + 3, length - 1)
      for t in range(at, stop):
        losses.append(before[t, text[t + 1]] - after[t, text[t + 1]])
        divergences.append((np.exp(before[t]) * (before[t] - after[t])).sum())
      changes.append(np.exp(before[at]) - np.exp(after[at]))
    np.testing.assert_allclose(
      columns['effect_ce'][latent], np.mean(losses), rtol=1e-2, atol=1e-4
    )
    np.testing.assert_allclose(
      columns['effect_kl'][latent], np.mean(divergences), rtol=1e-2, atol=1e-5
    )
    change = np.mean(changes, 0)
    assert np.abs(change).max() > 1e-3
    for way, order in (
      ('up', np.argsort(-change)),
      ('down', np.argsort(change)),
    ):
      np.testing.assert_allclose(
        columns[f'effect_{way}_changes'][latent], change[order[:10]], atol=2e-5
      )
      # The tokens are those of these changes.
      np.testing.assert_allclose(
        change[columns[f'effect_{way}_ids'][latent]],
        columns[f'effect_{way}_changes'][latent],
        atol=2e-5,
      )
  own, other = (
    figure(effects, outcome, 'agreement', who).value
    for who in ('trained', effects.OTHER)
  )
  assert own > other + 0.1
