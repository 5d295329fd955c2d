"""Logistic fits to single columns in float64, one by one."""

import numpy as np
import scipy.special


def losses(x_PN, labels):
  """The least loss [L, N] of each column for each set of labels."""
  return np.array([[least_loss(x_P, y_P) for x_P in x_PN.T] for y_P in labels])


def least_loss(x_P, y_P):
  """The least mean cross-entropy, by damped Newton-Raphson in float64."""
  x_P = np.asarray(x_P, np.float64)
  z_P = (x_P - x_P.mean()) / x_P.std()
  design_P2 = np.stack([z_P, np.ones_like(z_P)], 1)

  def loss(theta):
    logit_P = design_P2 @ theta
    return np.mean(np.logaddexp(0, logit_P) - y_P * logit_P)

  theta = np.array([0, scipy.special.logit(y_P.mean())])
  for _ in range(100):
    p_P = scipy.special.expit(design_P2 @ theta)
    grad = design_P2.T @ (p_P - y_P) / len(y_P)
    hess = (design_P2.T * (p_P * (1 - p_P))) @ design_P2 / len(y_P)
    step = np.linalg.solve(hess + 1e-14 * np.eye(2), grad)
    share = 1.0
    while loss(theta - share * step) > loss(theta) and share > 1e-9:
      share /= 2
    theta = theta - share * step
    if grad @ step < 1e-15:
      break
  return loss(theta)
