"""Least squares with bounds, robust where asked, of many fits at once."""

from collections.abc import Callable

import numpy as np

_MOST_STEPS = 300
_LEAST_DAMPING, _MOST_DAMPING = 1e-14, 1e12

Residuals = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def huber(residual, delta) -> np.ndarray:
  """Huber's loss: r^2 / 2 up to delta, then linear."""
  size = np.abs(residual)
  tail = np.minimum(size, delta)
  # An infinite delta times the 0 beyond it would be nan.
  return tail * tail / 2 + np.where(size > tail, delta, 0.0) * (size - tail)


def minimise(
  residuals: Residuals,
  start_FP,
  lower_P,
  upper_P,
  delta_FR,
  most_steps: int = _MOST_STEPS,
  tolerance: float = 1e-13,
) -> tuple[np.ndarray, np.ndarray]:
  """Levenberg-Marquardt with a box, F independent fits side by side.

  Each fit's result depends on its own numbers alone.

  Args:
    residuals: function of coefficients [f, P] and of the numbers [f] of the
      fits that they are of, to residuals [f, R] and their Jacobian [f, R, P].
    start_FP: where each fit starts.
    lower_P: least values, may be infinite.
    upper_P: greatest values.
    delta_FR: where Huber's loss of a residual turns linear; inf for squares.
    most_steps: steps after which a fit ends as it is.
    tolerance: a fit ends at a step that takes a smaller share off its loss.

  Returns:
    Coefficients [F, P] and the loss of each fit [F].
  """
  theta_FP = np.clip(np.array(start_FP, float), lower_P, upper_P)
  n_fits, size = theta_FP.shape
  damping_F = np.full(n_fits, 1e-3)
  going = np.arange(n_fits)
  residual_FR, jacobian_FRP = map(np.array, residuals(theta_FP, going))
  cost_F = huber(residual_FR, delta_FR).sum(-1)
  eye = np.eye(size)
  for _ in range(most_steps):
    if not len(going):
      break
    r, jac, theta = residual_FR[going], jacobian_FRP[going], theta_FP[going]
    weight = np.minimum(1, delta_FR[going] / np.maximum(np.abs(r), 1e-300))
    weighted = jac * weight[..., None]
    hessian = np.swapaxes(weighted, 1, 2) @ jac
    gradient = np.einsum('frp,fr->fp', weighted, r)
    held = ((theta <= lower_P) & (gradient > 0)) | (
      (theta >= upper_P) & (gradient < 0)
    )
    free = ~held
    hessian = hessian * (free[:, :, None] & free[:, None, :])
    diagonal = np.einsum('fpp->fp', hessian)
    largest = np.maximum(diagonal.max(-1, keepdims=True), 1e-300)
    # A coefficient that nothing depends on stays where it is.
    scale = np.maximum(diagonal, 1e-13 * largest) + held
    matrix = hessian + eye * (damping_F[going, None] * scale + held)[:, None]
    step = -np.linalg.solve(matrix, (gradient * free)[..., None])[..., 0]
    new = np.clip(theta + step, lower_P, upper_P)
    new_residual, new_jacobian = residuals(new, going)
    new_cost = huber(new_residual, delta_FR[going]).sum(-1)
    better = new_cost < cost_F[going]
    gain = cost_F[going] - new_cost
    small = np.abs(new - theta).max(-1) <= 1e-12 * (1 + np.abs(theta).max(-1))
    # Steps that an undamped solution no longer improves have met rounding.
    ended = np.where(
      better,
      gain <= tolerance * cost_F[going],
      damping_F[going] >= 1e6,
    ) | (small & ~better)
    damping_F[going] = np.clip(
      damping_F[going] * np.where(better, 0.2, 8.0),
      _LEAST_DAMPING,
      _MOST_DAMPING,
    )
    changed = going[better]
    theta_FP[changed] = new[better]
    residual_FR[changed] = new_residual[better]
    jacobian_FRP[changed] = new_jacobian[better]
    cost_F[changed] = new_cost[better]
    going = going[~ended]
  return theta_FP, cost_F
