"""Forms, their gradients, and least squares of many fits at once."""

import numpy as np
import pytest
from scipy import optimize

from sae_jax.scaling import forms, projection, solve
from tests.support import scaling_cells

FORMS = (forms.SURFACE, forms.WIDTH, forms.COMPUTE, forms.POWER)


def points(form, rng, rows=7):
  names = sorted({v for c in form.coefficients for v in c.variables})
  return form.columns({name: rng.normal(size=rows) for name in names})


def differences(function, theta_P, step=1e-6):
  """Central differences of a function [R] of coefficients, [R, P]."""
  columns = []
  for axis in np.eye(len(theta_P)):
    ahead, behind = (function(theta_P + s * step * axis) for s in (1, -1))
    columns.append((ahead - behind) / (2 * step))
  return np.stack(columns, -1)


@pytest.mark.parametrize('form', FORMS, ids=lambda form: form.name)
def test_gradients_are_those_of_finite_differences(form):
  rng = np.random.default_rng(0)
  columns_RP = points(form, rng)
  theta_P = 0.5 * rng.normal(size=len(form.coefficients))

  def log_value(theta):
    return forms.log_value(form, theta[None], columns_RP)[0][0]

  _, gradient_FRP = forms.log_value(form, theta_P[None], columns_RP)
  wanted_RP = differences(log_value, theta_P)
  np.testing.assert_allclose(gradient_FRP[0], wanted_RP, atol=1e-8)
  # Control: the gradient at another place is another.
  _, other = forms.log_value(form, theta_P[None] + 0.1, 1.1 * columns_RP)
  assert np.abs(other[0] - wanted_RP).max() > 1e-3


@pytest.mark.parametrize('form', FORMS[:3], ids=lambda form: form.name)
def test_the_projection_has_the_exact_gradient_of_its_loss(form):
  rng = np.random.default_rng(1)
  columns_RP = points(form, rng, rows=12)
  y_FR = np.exp(0.3 * rng.normal(size=(1, 12)))
  residuals = projection._Residuals(form, columns_RP, y_FR)
  theta_E = 0.3 * rng.normal(size=int((~form.is_constant_P).sum()))
  fits = np.array([0])

  def loss(theta):
    residual, _ = residuals(theta[None], fits)
    return (residual**2).sum(-1) / 2

  residual, jacobian = residuals(theta_E[None], fits)
  gradient_E = (jacobian[0] * residual[0][:, None]).sum(0)
  np.testing.assert_allclose(
    gradient_E, differences(loss, theta_E)[0], atol=1e-7
  )


def test_factors_are_those_of_non_negative_least_squares():
  rng = np.random.default_rng(2)
  basis_FRJ = rng.random((40, 9, 2)) * [1, 0.5] + [0, 0.2]
  # So that in some fits one of the two is held at 0.
  basis_FRJ[::2, :, 1] -= 0.3
  factors = projection._factors(basis_FRJ, np.ones((40, 9)))
  wanted = [optimize.nnls(basis, np.ones(9))[0] for basis in basis_FRJ]
  np.testing.assert_allclose(factors, wanted, atol=1e-8)
  assert 0 < (np.array(wanted) == 0).any(-1).sum() < 40


@pytest.mark.parametrize('delta', [0.05, np.inf])
def test_many_fits_at_once_are_what_scipy_gives_of_each(delta):
  rng = np.random.default_rng(3)
  x_R = np.linspace(0, 2, 15)
  y_FR = np.exp(-1.3 * x_R) + 0.1 * rng.normal(size=(4, 15))
  lower, upper = np.array([-2, -1]), np.array([2, 3])

  def residuals(theta, fits):
    curve = np.exp(theta[:, :1] - theta[:, 1:] * x_R)
    jacobian = np.stack([curve, -curve * x_R], -1)
    return curve - y_FR[fits], jacobian

  start = np.zeros((4, 2))
  theta, cost = solve.minimise(
    residuals, start, lower, upper, np.full(y_FR.shape, delta)
  )
  for fit in range(4):

    def one(x, fit=fit):
      return residuals(x[None], np.array([fit]))[0][0]

    scale = {'loss': 'huber', 'f_scale': delta} if delta < 1 else {}
    wanted = optimize.least_squares(
      one, start[fit], bounds=(lower, upper), xtol=1e-12, ftol=1e-12,
      gtol=1e-12, **scale,
    )  # fmt: skip
    np.testing.assert_allclose(theta[fit], wanted.x, atol=2e-5)
    np.testing.assert_allclose(cost[fit], wanted.cost, rtol=1e-7)
  # Each fit is its own: alone it is the same.
  alone, _ = solve.minimise(
    lambda theta, fits: residuals(theta, fits + 2), start[:1], lower, upper,
    np.full((1, 15), delta),
  )  # fmt: skip
  np.testing.assert_array_equal(alone[0], theta[2])


def test_a_bound_holds_and_the_rest_is_fitted():
  def residuals(theta, _):
    identity = np.broadcast_to(np.eye(2), (len(theta), 2, 2))
    return theta - np.array([3.0, 1.0]), identity

  theta, _ = solve.minimise(
    residuals, np.zeros((1, 2)), np.full(2, -9.0), np.array([2.0, 9.0]),
    np.full((1, 2), np.inf),
  )  # fmt: skip
  np.testing.assert_allclose(theta[0], [2, 1])


def test_huber_is_a_parabola_and_then_a_line():
  np.testing.assert_allclose(
    solve.huber(np.array([-1.0, 0.5, 5.0]), 2.0), [0.5, 0.125, 8.0]
  )
  assert solve.huber(np.array([3.0]), np.inf)[0] == 4.5


def test_the_paper_has_the_slopes_that_it_says():
  n = np.array([2.0**20, 2.0**21])
  a, bk, bn, g, z, e = scaling_cells.COEFFICIENTS['paper']
  for k, slope in ((32, -0.163), (512, -0.279)):
    floor = np.exp(z + e * np.log(k))
    loss = forms.value(forms.SURFACE, forms.PAPER.coefficients, n=n, k=k)
    np.testing.assert_allclose(
      loss, np.exp(a + bk * np.log(k)) * n ** (bn + g * np.log(k)) + floor
    )
    assert abs(np.log2((loss[1] - floor) / (loss[0] - floor)) - slope) < 1e-3
