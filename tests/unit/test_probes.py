"""Probes against scipy, AUC against counting pairs, and honest selection."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from sae_jax import errors
from sae_jax.probing import newton, probes


def _cross_entropy(weight, bias, x_P, y_P):
  """Mean cross-entropy in nats, float64."""
  logit_P = weight * np.asarray(x_P, np.float64) + bias
  return np.mean(np.logaddexp(0, logit_P) - y_P * logit_P)


def _entropy(share):
  return -share * math.log(share) - (1 - share) * math.log1p(-share)


def _gradient(weight, bias, x_P, y_P):
  """Gradient in weight and bias of the standardised feature, float64."""
  x_P = np.asarray(x_P, np.float64)
  error_P = scipy.special.expit(np.float64(weight) * x_P + bias) - y_P
  z_P = (x_P - x_P.mean()) / x_P.std()
  return np.array([np.mean(error_P * z_P), np.mean(error_P)])


def _bfgs(x_P, y_P):
  """Weight and bias by scipy, on the standardised feature, float64."""
  x_P = np.asarray(x_P, np.float64)
  mean, std = x_P.mean(), x_P.std()
  z_P = (x_P - mean) / std

  def loss_and_gradient(theta):
    error_P = scipy.special.expit(theta[0] * z_P + theta[1]) - y_P
    gradient = np.array([np.mean(error_P * z_P), np.mean(error_P)])
    return _cross_entropy(*theta, z_P, y_P), gradient

  fitted = scipy.optimize.minimize(
    loss_and_gradient,
    np.zeros(2),
    jac=True,
    method='BFGS',
    options={'gtol': 1e-10},
  )
  weight, bias = fitted.x
  return weight / std, bias - weight * mean / std


def _plain_newton(x_P, y_P, steps=60):
  """Newton-Raphson as in a textbook, without any safeguard, float32."""
  design_P2 = np.stack([x_P, np.ones_like(x_P)], 1).astype(np.float32)
  theta = np.zeros(2, np.float32)
  with np.errstate(all='ignore'):
    for _ in range(steps):
      p_P = scipy.special.expit(design_P2 @ theta)
      (a, b), (_, c) = (design_P2.T * (p_P * (1 - p_P))) @ design_P2
      g, h = design_P2.T @ (p_P - y_P.astype(np.float32))
      theta = theta - np.array([c * g - b * h, a * h - b * g]) / (a * c - b * b)
  return theta


def _features(rng, y_P):
  """Columns of many kinds, each with a finite maximum-likelihood fit."""
  n = len(y_P)
  gauss = rng.standard_normal((n, 6)) + y_P[:, None] * np.linspace(-1, 2, 6)
  sparse = np.maximum(rng.standard_normal(n) - 1 + 0.5 * y_P, 0)
  heavy = rng.standard_t(2, n) + y_P
  binary = (rng.random(n) < 0.05 + 0.2 * y_P) * 1.0
  columns = [sparse, heavy, binary]
  scaled = [sparse * 1e-12, heavy * 1e12, gauss[:, 0] * 0.1 + 50]
  return np.column_stack([gauss, *columns, *scaled]).astype(np.float32)


@pytest.mark.parametrize('share', [0.5, 0.1])
def test_fit_matches_scipy(share):
  rng = np.random.default_rng(0)
  y_P = (rng.random(400) < share).astype(int)
  x_PN = _features(rng, y_P)
  fitted = probes.fit_probes(x_PN, y_P)
  for n in range(x_PN.shape[1]):
    weight, bias = _bfgs(x_PN[:, n], y_P)
    np.testing.assert_allclose(
      np.float64(fitted.weight_N[n]) * x_PN[:, n] + fitted.bias_N[n],
      weight * x_PN[:, n] + bias,
      rtol=1e-4,
      atol=1e-4,
      err_msg=f'column {n}',
    )
    best = _cross_entropy(weight, bias, x_PN[:, n], y_P)
    assert abs(fitted.train_ce_N[n] - best) < 1e-6


def test_the_gradient_vanishes_at_the_fit():
  rng = np.random.default_rng(1)
  y_P = rng.integers(0, 2, 400)
  x_PN = _features(rng, y_P)
  fitted = probes.fit_probes(x_PN, y_P)
  for n in range(x_PN.shape[1]):
    at = fitted.weight_N[n], fitted.bias_N[n]
    # The last column's intercept is near 600: its own rounding shows.
    bound = 5e-8 + np.spacing(np.abs(at[1])) / 4
    assert np.abs(_gradient(*at, x_PN[:, n], y_P)).max() < bound
    # The check can fail: a weight 1 % off shows.
    off = at[0] + 0.01 / x_PN[:, n].std(dtype=np.float64), at[1]
    assert np.abs(_gradient(*off, x_PN[:, n], y_P)).max() > 2e-4


def test_a_separating_feature_gets_a_finite_fit():
  y_P = np.arange(60) % 2
  rng = np.random.default_rng(2)
  gap = (2 * y_P - 1) * (0.5 + rng.random(60))
  # Wholly separated; separated but for ties; one prompt fires, for one class.
  single = np.where(np.arange(60) == 1, 5.0, 0.0)
  x_PN = np.column_stack([gap, -1e6 * gap, np.sign(gap), single])
  fitted = probes.fit_probes(x_PN, y_P)
  assert np.isfinite(np.concatenate(fitted)).all()
  assert (fitted.train_ce_N[:3] < 1e-4).all()
  assert fitted.weight_N[0] > 0 > fitted.weight_N[1]
  # The other 59 prompts are alike: 29 ones, 30 zeros.
  assert abs(fitted.train_ce_N[3] - 59 / 60 * _entropy(29 / 59)) < 1e-4

  # Newton without safeguards ends in nan here, though it works elsewhere.
  assert not np.isfinite(_plain_newton(np.sign(gap), y_P)).all()
  easy_P = rng.standard_normal(60) + y_P
  np.testing.assert_allclose(
    _plain_newton(easy_P, y_P), _bfgs(easy_P, y_P), rtol=1e-4
  )


def _fit_with_floored_entry(x_P, y_P, steps=64):
  """Newton-Raphson whose Hessian entry for the weight is at least 1e-4."""
  z_P = (x_P - x_P.mean()) / x_P.std()
  weight, bias = 0.0, np.log(y_P.mean() / (1 - y_P.mean()))
  for _ in range(steps):
    p_P = scipy.special.expit(weight * z_P + bias)
    c_P = p_P * (1 - p_P)
    away_P = z_P - np.mean(c_P * z_P) / c_P.mean()
    step = -np.mean((p_P - y_P) * away_P)
    step /= max(np.mean(c_P * away_P**2), 1e-4)
    weight += step
    bias += np.mean(y_P - p_P) / c_P.mean() + step * (away_P - z_P)[0]
  return _cross_entropy(weight, bias, z_P, y_P)


def test_an_outlying_value_does_not_stall_the_fit():
  rng = np.random.default_rng(11)
  y_P = (np.arange(60) < 20).astype(int)
  x_PN = np.exp(3 * rng.standard_normal((60, 40))) * (1 + 5 * y_P[:, None])
  # Of both classes at either end, so that no column is separable.
  x_PN[[0, 59]] = x_PN.min(0)
  x_PN[[1, 58]] = x_PN.max(0)
  x_PN = x_PN.astype(np.float32)
  fitted = probes.fit_probes(x_PN, y_P)
  best_N = [_cross_entropy(*_bfgs(x_P, y_P), x_P, y_P) for x_P in x_PN.T]
  np.testing.assert_allclose(fitted.train_ce_N, best_N, atol=1e-6)
  x_P = np.exp(3 * rng.standard_normal(60)) * np.where(y_P, 1e-3, 1.0)
  x_P[58], x_P[59] = 1e4, x_P.min()
  best = _cross_entropy(*_bfgs(x_P, y_P), x_P, y_P)
  fitted = probes.fit_probes(x_P[:, None], y_P)
  assert abs(fitted.train_ce_N[0] - best) < 1e-6
  # A floor on the Hessian's entry, not on the curvature, does stall here.
  assert _fit_with_floored_entry(x_P, y_P) > best + 0.1


@pytest.mark.parametrize('value', [0.0, -7.5, 3e38, np.nan, np.inf])
def test_a_column_without_information_predicts_the_prevalence(value):
  y_P = (np.arange(50) < 15).astype(int)
  x_PN = np.full((50, 3), value)
  if not np.isfinite(value):
    x_PN[1:] = np.arange(49)[:, None]
  x_PN[:, 1] = np.random.default_rng(3).standard_normal(50) + y_P
  fitted = probes.fit_probes(x_PN, y_P)
  assert fitted.weight_N[0] == fitted.weight_N[2] == 0
  np.testing.assert_allclose(fitted.bias_N[0], math.log(15 / 35), rtol=1e-6)
  np.testing.assert_allclose(fitted.train_ce_N[0], _entropy(0.3), rtol=1e-6)
  # Its neighbour in the same vmap is fitted as if it were alone.
  alone = probes.fit_probes(x_PN[:, 1:2], y_P)
  np.testing.assert_allclose(fitted.weight_N[1], alone.weight_N[0], rtol=1e-5)


@pytest.mark.parametrize('scale', [1e-38, 1e-30, 1e30, 3e38])
def test_extreme_scales_stay_finite(scale):
  y_P = np.arange(40) % 2
  x_P = (np.random.default_rng(4).random(40) + y_P) * scale / 2
  fitted = probes.fit_probes(x_P[:, None].astype(np.float32), y_P)
  assert np.isfinite(np.concatenate(fitted)).all()
  assert fitted.train_ce_N[0] < _entropy(0.5) + 1e-6


def test_flipped_labels_flip_the_probe():
  rng = np.random.default_rng(5)
  y_P = rng.integers(0, 2, 200)
  x_PN = _features(rng, y_P)[:, :9]
  one, other = probes.fit_probes(x_PN, y_P), probes.fit_probes(x_PN, 1 - y_P)
  np.testing.assert_allclose(one.weight_N, -other.weight_N, rtol=1e-3)
  np.testing.assert_allclose(one.train_ce_N, other.train_ce_N, atol=1e-6)


def test_chunks_change_nothing(monkeypatch):
  rng = np.random.default_rng(6)
  y_P = rng.integers(0, 2, 100)
  x_PN = (rng.standard_normal((100, 23)) + y_P[:, None]).astype(np.float32)
  whole = probes.fit_probes(x_PN, y_P)
  monkeypatch.setattr(newton, 'columns', lambda: 5)
  monkeypatch.setattr(probes, '_WIDTH', 5)
  parts = probes.fit_probes(jnp.asarray(x_PN), y_P)
  for a, b in zip(whole, parts):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(
    probes.auc(x_PN, y_P), probes.auc(x_PN, y_P, chunk_elements=500)
  )
  np.testing.assert_allclose(
    probes.probe_loss(whole, x_PN, y_P, chunk_elements=500),
    probes.probe_loss(whole, x_PN, y_P),
    rtol=1e-5,
  )


def test_loss_is_the_training_loss_on_the_training_prompts():
  rng = np.random.default_rng(7)
  y_P = rng.integers(0, 2, 300)
  x_PN = _features(rng, y_P)
  fitted = probes.fit_probes(x_PN, y_P)
  loss_N = probes.probe_loss(fitted, x_PN, y_P)
  np.testing.assert_allclose(loss_N, fitted.train_ce_N, atol=1e-6)
  other_PN = np.roll(x_PN, 1, 0)
  expected = [
    _cross_entropy(np.float64(w), np.float64(b), x_P, y_P)
    for w, b, x_P in zip(fitted.weight_N, fitted.bias_N, other_PN.T)
  ]
  np.testing.assert_allclose(
    probes.probe_loss(fitted, other_PN, y_P), expected, rtol=1e-5
  )


def test_a_value_that_is_not_finite_shows_in_the_loss():
  fitted = probes.Probes(*np.float32([[1, 0], [0, 0], [0, 0]]))
  x_PN = np.array([[np.nan, np.nan], [0.0, 0.0]])
  loss_N = probes.probe_loss(fitted, x_PN, [1, 0])
  assert np.isnan(loss_N[0])
  np.testing.assert_allclose(loss_N[1], math.log(2), rtol=1e-6)


def _count_pairs(x_P, y_P):
  ones, zeros = x_P[y_P == 1], x_P[y_P == 0]
  wins = sum(float(a > b) + 0.5 * float(a == b) for a in ones for b in zeros)
  return wins / (len(ones) * len(zeros))


def test_auc_counts_pairs():
  rng = np.random.default_rng(8)
  y_P = np.repeat([0, 1], [40, 17])
  x_PN = np.column_stack(
    [
      rng.standard_normal(57),
      rng.integers(0, 4, 57),
      np.maximum(rng.standard_normal(57), 0),
      np.zeros(57),
      y_P,
      -y_P,
      1e9 + rng.permutation(57),
      np.where(rng.random(57) < 0.5, np.inf, -np.inf),
    ]
  )
  expected = [_count_pairs(x_P, y_P) for x_P in x_PN.T]
  np.testing.assert_array_equal(expected[3:6], [0.5, 1.0, 0.0])
  np.testing.assert_allclose(probes.auc(x_PN, y_P), expected, rtol=1e-14)
  # Ranks without averaged ties give another number where all are tied.
  naive = np.arange(1, 58)[y_P == 1].sum() - 17 * 18 / 2
  assert naive / (17 * 40) == 1.0
  assert np.isnan(probes.auc(np.array([[np.nan], [1.0]]), [0, 1]))


def test_the_planted_latent_is_found_whatever_its_sign():
  rng = np.random.default_rng(9)
  y_P = np.arange(400) % 2
  x_PN = rng.standard_normal((400, 50)).astype(np.float32)
  x_PN[:, 17] -= 3 * y_P
  score = probes.score_task(x_PN[:300], y_P[:300], x_PN[300:], y_P[300:])
  assert score.best_latent == 17
  np.testing.assert_allclose(
    score.test_auc, _count_pairs(-x_PN[300:, 17], y_P[300:]), rtol=1e-12
  )
  assert score.test_auc_low < score.test_auc < score.test_auc_high
  fitted = probes.fit_probes(x_PN[:300, 17:18], y_P[:300])
  expected = _cross_entropy(
    fitted.weight_N[0], fitted.bias_N[0], x_PN[300:, 17], y_P[300:]
  )
  np.testing.assert_allclose(score.test_ce, expected, rtol=1e-5)
  assert abs(score.train_ce - fitted.train_ce_N[0]) < 1e-6
  np.testing.assert_allclose(score.prevalence_ce, math.log(2))


def test_the_constant_predictor_is_fitted_on_the_training_prompts():
  train_P = (np.arange(40) < 10).astype(int)
  test_P = (np.arange(40) < 30).astype(int)
  score = probes.score_task(
    np.zeros((40, 2)), train_P, np.zeros((40, 2)), test_P
  )
  expected = -0.75 * math.log(0.25) - 0.25 * math.log(0.75)
  np.testing.assert_allclose(score.prevalence_ce, expected)
  np.testing.assert_allclose(score.test_ce, expected, rtol=1e-6)
  assert score.test_auc_low < score.test_auc == 0.5 < score.test_auc_high


def test_choosing_on_the_held_out_prompts_would_flatter():
  y_P = np.arange(120) % 2
  honest, flattered, train = [], [], []
  for seed in range(8):
    # Noise alone: no probe can beat the constant predictor but by luck.
    x_PN = np.random.default_rng(seed).standard_normal((120, 400))
    halves = x_PN[:60], y_P[:60], x_PN[60:], y_P[60:]
    score = probes.score_task(*halves)
    fitted = probes.fit_probes(*halves[:2])
    honest.append(score.test_ce)
    train.append(score.train_ce)
    flattered.append(probes.probe_loss(fitted, *halves[2:]).min())
  assert np.mean(honest) > math.log(2)
  assert np.mean(flattered) < math.log(2) - 0.02
  assert np.mean(train) < math.log(2) - 0.05


def test_errors_name_the_numbers():
  x_PN = np.zeros((4, 2))
  with pytest.raises(
    errors.UserError, match='4 labels hold 4 zeros and 0 ones'
  ):
    probes.fit_probes(x_PN, [0, 0, 0, 0])
  with pytest.raises(
    errors.UserError, match='4 labels hold 1 zeros and 1 ones'
  ):
    probes.auc(x_PN, [0, 1, 2, -1])
  with pytest.raises(
    errors.UserError, match=r'shape \(4, 2\) and labels .* \(3,\)'
  ):
    probes.fit_probes(x_PN, [0, 1, 0])
  with pytest.raises(
    errors.UserError, match='of 2 latents, test features of 3'
  ):
    probes.score_task(x_PN, [0, 1, 0, 1], np.zeros((4, 3)), [0, 1, 0, 1])
  empty = probes.fit_probes(np.zeros((4, 0)), [0, 1, 0, 1])
  assert empty.weight_N.shape == (0,)
