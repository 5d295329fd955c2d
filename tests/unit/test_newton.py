"""Columns fitted at once against Newton-Raphson in float64, one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.probing import newton
from tests.support import newton_reference


def make_columns(n_columns, n_prompts, seed=0):
  """Columns as latents have them: dense, sparse, of many scales, some alike."""
  rng = np.random.default_rng(seed)
  y_P = (rng.random(n_prompts) < 0.4).astype(int)
  x_PN = rng.standard_normal((n_prompts, n_columns))
  effect_N = rng.exponential(0.5, n_columns) * rng.choice([-1, 0, 1], n_columns)
  x_PN += effect_N * y_P[:, None]
  rare_N = rng.uniform(0, 1.5, n_columns) * (rng.random(n_columns) < 0.5)
  x_PN = np.where(rare_N > 0, np.maximum(x_PN - rare_N, 0), x_PN)
  x_PN *= 10.0 ** rng.uniform(-4, 3, n_columns)
  # None separates the classes: the first prompts of both have either end.
  for label in (0, 1):
    first, second = np.flatnonzero(y_P == label)[:2]
    x_PN[first], x_PN[second] = x_PN.min(0), x_PN.max(0)
  return x_PN.astype(np.float32), y_P


def program():
  """`newton.fit` of one group, compiled anew."""
  return jax.jit(lambda *group: newton.fit([group]))


fit_group = program()


def fit(x_PN, labels, fit_group=fit_group):
  """Weights, biases and losses [L, N] of columns for sets of labels."""
  n_rows = newton.padded(len(x_PN))
  signs_LP = np.stack([newton.signs(y_P, n_rows) for y_P in labels])
  more = ((0, n_rows - len(x_PN)), (0, 0))
  # Whatever is in rows that are no prompt.
  x_PN = np.pad(x_PN, more, constant_values=7e3)
  return [np.asarray(a) for a in fit_group(x_PN, signs_LP)]


@pytest.fixture(scope='module')
def pairs():
  """1,000 pairs of column and labels, and the least loss of each."""
  x_PN, y_P = make_columns(500, 150)
  other_P = np.random.default_rng(1).permutation(y_P)
  # The ends are of both classes for these as well.
  other_P[:4] = y_P[:4]
  labels = (y_P, other_P)
  return x_PN, labels, newton_reference.losses(x_PN, labels)


def test_losses_equal_those_of_newton_in_float64(pairs):
  x_PN, labels, want_LN = pairs
  weight_LN, bias_LN, ce_LN = fit(x_PN, labels)
  np.testing.assert_allclose(ce_LN, want_LN, atol=1e-6)
  # The probes that are returned have these losses.
  for weight_N, bias_N, ce_N, y_P in zip(weight_LN, bias_LN, ce_LN, labels):
    logit_PN = np.float64(x_PN) * weight_N + bias_N
    nats_PN = np.logaddexp(0, logit_PN) - y_P[:, None] * logit_PN
    np.testing.assert_allclose(nats_PN.mean(0), ce_N, atol=1e-6)


def test_the_comparison_sees_a_wrong_hessian(pairs, monkeypatch):
  x_PN, labels, want_LN = pairs
  sums = newton._sums

  def wrong(*args):
    right = sums(*args)
    return right._replace(second_away2_S=1e5 * right.second_away2_S)

  monkeypatch.setattr(newton, '_sums', wrong)
  _, _, ce_LN = fit(x_PN, labels, program())
  assert np.abs(ce_LN - want_LN).max() > 1e-5


def test_the_comparison_sees_rows_that_are_no_prompt(pairs, monkeypatch):
  x_PN, labels, want_LN = pairs
  monkeypatch.setattr(newton, '_FAR', 0.0)
  _, _, ce_LN = fit(x_PN, labels, program())
  assert np.abs(ce_LN - want_LN).max() > 1e-5


def test_a_fit_does_not_depend_on_the_columns_beside_it():
  x_PN, y_P = make_columns(256, 60, seed=2)
  # One takes many steps, as it separates the classes.
  x_PN[:, 9] = y_P + 0.1 * np.random.default_rng(3).random(60)
  _, _, (ce_N,) = fit(x_PN, [y_P])
  order = np.random.default_rng(4).permutation(256)
  _, _, (shuffled_N,) = fit(x_PN[:, order], [y_P])
  np.testing.assert_array_equal(shuffled_N, ce_N[order])
  easy_PN = x_PN.copy()
  easy_PN[:, 9] = 0
  _, _, (without_N,) = fit(easy_PN, [y_P])
  np.testing.assert_array_equal(np.delete(without_N, 9), np.delete(ce_N, 9))


def test_groups_are_fitted_as_if_alone():
  x_PN, y_P = make_columns(256, 64, seed=5)
  signs_1P = jnp.asarray(newton.signs(y_P, 64))[None]
  together = jax.jit(newton.fit)([(x_PN, signs_1P), (x_PN[::-1], -signs_1P)])
  for place, group in enumerate(((x_PN, y_P), (x_PN[::-1], 1 - y_P))):
    for one, alone in zip(together, fit(group[0], [group[1]])):
      np.testing.assert_allclose(one[place], alone[0], rtol=1e-5, atol=1e-6)


def test_numbers_of_prompts_share_programs():
  assert [newton.padded(n) for n in (1, 32, 33, 120, 800)] == [
    32, 32, 64, 128, 832,
  ]  # fmt: skip
  sizes = {newton.padded(n) for n in range(2, 2049)}
  assert len(sizes) < 50
  assert all(
    n <= newton.padded(n) <= max(n + 32, 9 * n / 8) for n in range(1, 5000)
  )
  assert all(size % newton.PROMPTS == 0 for size in sizes)
