"""Evaluations of rows beside their definitions in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from sae_jax import mesh as mesh_lib
from sae_jax.probing import baselines
from sae_jax.probing.suite import controls, figures
from sae_jax.probing.suite.evaluations import (
  error,
  projections,
  recovery,
  refinement,
)
from tests.support import probed, suites


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return suites.write_store(str(tmp_path_factory.mktemp('suite') / 'store'))


def figure(evaluation, outcome, name, who='trained'):
  return figures.figure(evaluation.STATISTICS[name], outcome.samples[who])


def sums_of(outcome, who='trained'):
  return {t: of.sum(0) for t, of in outcome.samples[who].sums.items()}


def preprocessed(trained, raw_BD):
  return probed.inputs(trained, raw_BD)[0]


def test_controls_are_what_they_say(data, trained):
  """Components reconstruct as PCA does, channels keep the largest."""
  mesh = mesh_lib.one_device()
  state = suites.fitted(trained, data)
  rows = data.test_rows
  raw_BD = data.read_rows(rows.start, rows.stop)
  x_BD = preprocessed(trained, raw_BD)
  pca = controls.components(trained, state, suites.K, mesh)
  codes = pca.encode(raw_BD)
  scatter = ((x_BD - x_BD.mean(0)) ** 2).sum()
  want = baselines.pca_fvu(baselines.principal(state, suites.K), [x_BD])[-1]
  raw_new = np.asarray(pca.reconstruct(raw_BD), np.float64)
  shift, scale = probed.inputs(trained, raw_BD)[1]
  left = ((x_BD - (raw_new - shift) / scale) ** 2).sum() / scatter
  assert left == pytest.approx(want, rel=1e-4)
  assert (np.asarray(codes.values) > 0).sum(1).max() == suites.K
  channels = controls.channels(trained, state, suites.K, mesh)
  raw_new = np.asarray(channels.reconstruct(raw_BD), np.float64)
  got = (raw_new - shift) / scale
  centred = x_BD - state.mean_D
  kept = np.argsort(-np.abs(centred), 1, kind='stable')[:, : suites.K]
  want = np.broadcast_to(state.mean_D, x_BD.shape).copy()
  rows_B1 = np.arange(len(x_BD))[:, None]
  want[rows_B1, kept] = x_BD[rows_B1, kept]
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_the_mean_scores_one_and_the_whole_nothing(data, trained):
  """FVU of an autoencoder that says the mean, and of one that says all."""
  mesh = mesh_lib.one_device()
  state = suites.fitted(trained, data)
  whole = controls.of_directions(
    trained, np.eye(probed.D_MODEL), state.mean_D, probed.D_MODEL, mesh
  )
  blank = dataclasses.replace(
    whole, sae=whole.sae.replace(b_lat_N=whole.sae.b_lat_N - 1e3)
  )
  context = suites.context(trained, data, scored={'all': whole, 'none': blank})
  mean_D = context.mean('none')
  blank = dataclasses.replace(
    blank, sae=blank.sae.replace(b_pre_D=jnp.asarray(mean_D))
  )
  context = suites.context(trained, data, scored={'all': whole, 'none': blank})
  outcome = recovery.measure(context)
  got = figure(recovery, outcome, 'fvu', 'none')
  assert got.value == pytest.approx(1, abs=1e-7)
  assert figure(recovery, outcome, 'fvu', 'all').value < 1e-10
  refined = refinement.measure(context)
  got = figure(refinement, refined, 'fvu_refined', 'none')
  assert got.value == pytest.approx(1)
  # No latent is active: there is no shrinkage to speak of, and no nan.
  assert figure(refinement, refined, 'shrinkage', 'none').value is None


@pytest.mark.parametrize('activation', ['topk', 'relu', 'jumprelu'])
def test_recovery_is_that_of_ranks(data, activation, monkeypatch):
  suites.shrink(monkeypatch, recovery, rows=60, batch_rows=16)
  trained = probed.make_trained(data, activation=activation)
  context = suites.context(trained, data, scored={'trained': trained})
  outcome = recovery.measure(context)
  drawn = context.rows(60)
  x_BD = preprocessed(trained, drawn.raw_BD)
  sae = probed.wide(trained)
  pre_BN = (x_BD - sae.b_pre_D) @ sae.w_enc_ND.T + sae.b_lat_N
  pre_BN = np.maximum(pre_BN, 0)
  mean_D = np.float64(context.mean('trained'))
  variance = ((x_BD - mean_D) ** 2).sum()
  curve = figure(recovery, outcome, 'fvu_topk')
  for k, got in zip(outcome.points['latents'], curve.value):
    order = np.argsort(-pre_BN, 1, kind='stable')
    kept_BN = np.zeros_like(pre_BN)
    rows_B1 = np.arange(len(pre_BN))[:, None]
    kept_BN[rows_B1, order[:, :k]] = pre_BN[rows_B1, order[:, :k]]
    want = ((x_BD - probed.decoded(trained, kept_BN)) ** 2).sum() / variance
    assert got == pytest.approx(want, rel=2e-4)
  # Thresholds are of validation rows: as many exceed them there.
  rows = data.validation_rows
  chosen_on = preprocessed(trained, data.read_rows(rows.start, rows.stop))
  their_BN = (chosen_on - sae.b_pre_D) @ sae.w_enc_ND.T + sae.b_lat_N
  order = np.sort(np.maximum(their_BN, 0), axis=None)[::-1]
  curve = figure(recovery, outcome, 'fvu_threshold')
  l0 = figure(recovery, outcome, 'l0_threshold')
  for place, k in enumerate(outcome.points['latents'][:3]):
    least = order[k * len(chosen_on) - 1]
    kept_BN = np.where((pre_BN >= least * (1 - 1e-6)) & (pre_BN > 0), pre_BN, 0)
    want = ((x_BD - probed.decoded(trained, kept_BN)) ** 2).sum() / variance
    assert curve.value[place] == pytest.approx(want, rel=2e-3)
    assert l0.value[place] == pytest.approx((kept_BN > 0).sum(1).mean(), 1e-3)


def test_refined_magnitudes_are_non_negative_least_squares(data, trained):
  context = suites.context(trained, data, scored={'trained': trained})
  raw_BD = context.rows(40).raw_BD
  x_BD = preprocessed(trained, raw_BD)
  z_BN = probed.latents(trained, x_BD)
  sae = probed.wide(trained)
  idx_BK = np.argsort(-z_BN, 1, kind='stable')[:, : suites.K]
  vals_BK = np.take_along_axis(z_BN, idx_BK, 1)
  got = refinement.refined(
    jnp.float32(sae.w_dec_ND[idx_BK]),
    jnp.float32(x_BD - sae.b_pre_D),
    jnp.float32(vals_BK),
  )
  for row in range(len(x_BD)):
    own = vals_BK[row] > 0
    want = np.zeros(suites.K)
    target_D = x_BD[row] - sae.b_pre_D
    if own.any():
      want[own], _ = optimize.nnls(sae.w_dec_ND[idx_BK[row, own]].T, target_D)
    np.testing.assert_allclose(got[row], want, atol=2e-4)
  # Some are at the bound, where plain least squares would be below 0.
  assert (np.asarray(got)[vals_BK > 0] == 0).any()


@pytest.mark.parametrize('share', [1.0, 0.7])
def test_shrinkage_is_what_magnitudes_lack(data, trained, share):
  """Of orthonormal directions: none, or the share that was taken away."""
  mesh = mesh_lib.one_device()
  state = suites.fitted(trained, data)
  channels = controls.channels(trained, state, suites.K, mesh)
  scaled = dataclasses.replace(
    channels, sae=channels.sae.replace(w_enc_ND=channels.sae.w_enc_ND * share)
  )
  context = suites.context(trained, data, scored={'scaled': scaled})
  outcome = refinement.measure(context)
  got = figure(refinement, outcome, 'shrinkage', 'scaled')
  assert got.value == pytest.approx(1 - share, abs=1e-4)
  gain = figure(refinement, outcome, 'gain', 'scaled')
  assert (gain.value > 0.01) == (share < 1)


def test_a_linear_error_is_found_linear(data, trained, monkeypatch):
  """Of one component's mean reconstruction all error is linear in x."""
  suites.shrink(monkeypatch, error, fitted_rows=10_000, rows=200, batch_rows=64)
  monkeypatch.setattr(error, '_RIDGE', 1e-9)
  mesh = mesh_lib.one_device()
  state = suites.fitted(trained, data)
  one = controls.components(trained, state, 1, mesh)
  context = suites.context(
    trained, data, scored={'PCA': one, 'trained': trained}
  )
  outcome = error.measure(context)
  assert figure(error, outcome, 'linear', 'PCA').value > 0.9999
  assert figure(error, outcome, 'nonlinear_fvu', 'PCA').value < 1e-4
  # Of TopK it is not, and the figure is that of least squares.
  drawn = context.rows(200)
  train_BD, test_BD = (
    preprocessed(trained, raw)
    for raw in (data.read_rows(0, data.n_train), drawn.raw_BD)
  )
  errors = [
    x - probed.decoded(trained, probed.latents(trained, x))
    for x in (train_BD, test_BD)
  ]
  inputs = [
    np.concatenate([np.ones((len(x), 1)), x], 1) for x in (train_BD, test_BD)
  ]
  weights = np.linalg.lstsq(inputs[0], errors[0], rcond=None)[0]
  left = ((errors[1] - inputs[1] @ weights) ** 2).sum()
  want = 1 - left / ((errors[1] - errors[0].mean(0)) ** 2).sum()
  got = figure(error, outcome, 'linear')
  assert got.value == pytest.approx(want, abs=2e-3)
  assert got.value < 0.95


def test_projections_are_in_order(data, trained, monkeypatch):
  suites.shrink(monkeypatch, projections, rows=30, latents=1000, batch_rows=8)
  context = suites.context(trained, data, scored={'trained': trained})
  outcome = projections.measure(context)
  drawn = context.rows(30, 'projections')
  x_BD = preprocessed(trained, drawn.raw_BD)
  sae = probed.wide(trained)
  n_latents = trained.config.n_latents
  for draw in range(context.draws):
    own_BD = x_BD[drawn.draw_B == draw]
    order = np.sort((own_BD - sae.b_pre_D) @ sae.w_dec_ND.T, None)[::-1]
    want = order[n_latents // 2 * len(own_BD)]
    got = outcome.samples['trained'].sums['middle'][draw]
    assert got == pytest.approx(want, abs=1e-5)


def test_rows_of_a_suite_are_test_rows(data, trained):
  """Every draw is of test documents, and none is drawn twice."""
  context = suites.context(trained, data)
  drawn = context.rows(10_000)
  rows = data.test_rows
  raw_BD = data.read_rows(rows.start, rows.stop)
  assert len(drawn.raw_BD) == len(raw_BD)
  order, other = (np.lexsort(a.T) for a in (drawn.raw_BD, raw_BD))
  np.testing.assert_array_equal(drawn.raw_BD[order], raw_BD[other])
  places = data.stream_index()[rows.start : rows.stop]
  np.testing.assert_array_equal(
    np.unique(drawn.document_B), np.unique(data.documents()[places])
  )
  few = context.rows(5)
  assert sorted(set(few.draw_B.tolist())) == list(range(context.draws))
  assert len(few.raw_BD) < len(raw_BD)
  again = suites.context(trained, data, seed=1).rows(5)
  assert again.raw_BD.tobytes() != few.raw_BD.tobytes()
