"""Logistic regression with an L2 penalty whose strength is cross-validated.

The protocol is that of sae-probes 0.4.2 (Kantamneni et al. 2025, arXiv
2502.16681): C from 10 values, chosen by the mean AUC of the prompts left out of
the fit. Fits are Newton's, in float64 on the host, all C and all folds at once.
"""

import itertools
from typing import NamedTuple

import numpy as np
from scipy import special

from sae_jax.probing import probes

# The strongest penalty comes last: of equal AUCs the weaker one wins.
CS = np.logspace(5, -5, 10)

_LEAVE_PAIRS_OUT = 12
_FOLD_PROMPTS = 128
_FOLDS = 6
_HELD_OUT, _MOST_HELD_OUT = 0.2, 100
_MAX_STEPS = 100
_HALVINGS = 30
# Nats of the summed loss below which a Newton step changes nothing.
_CONVERGED = 1e-9


class Ridge(NamedTuple):
  """A regression: p(label 1) = sigmoid(x @ weight + bias).

  Attributes:
    weight_D: float64 weights.
    bias: intercept, which is not penalised.
    c: the strength that was chosen: the loss is C sum(nats) + |weight|^2 / 2.
    validation_auc: mean AUC of the prompts left out, at this C; nan if there
      were too few prompts to choose.
  """

  weight_D: np.ndarray
  bias: float
  c: float
  validation_auc: float

  def logits(self, x_PD) -> np.ndarray:
    """The logit of label 1, float64."""
    return np.asarray(x_PD, np.float64) @ self.weight_D + self.bias


def cross_validated(x_PD, labels_P, seed: int = 0) -> Ridge:
  """Fits with the C that does best on prompts left out of the fit.

  Up to 12 prompts every pair of one of each class is left out once, up to 127
  a sixth of each class, and from 128 on the last fifth of all, at most 100.

  Args:
    x_PD: inputs of the training prompts, in an order without meaning.
    labels_P: 0 or 1, both present.
    seed: seed of the folds.
  """
  labels_P = probes.checked_labels(np.shape(x_PD), labels_P)
  x_PD = np.asarray(x_PD, np.float64)
  mean_D = x_PD.mean(0)
  # The penalty does not know directions, and weights are in the prompts' span.
  to_DR = np.linalg.svd(x_PD - mean_D, full_matrices=False)[2].T
  x_PR = (x_PD - mean_D) @ to_DR
  left_out_FP = _folds(labels_P, seed)
  c, validation_auc = 1.0, np.nan
  if len(left_out_FP):
    aucs_FC = _aucs(x_PR, labels_P, left_out_FP)
    best = int(np.argmax(aucs_FC.mean(0)))
    c, validation_auc = CS[best], aucs_FC.mean(0)[best]
  every_1P = np.ones((1, len(labels_P)))
  weight_1R, bias_1 = fit(x_PR, labels_P, every_1P, np.array([c]))
  weight_D = to_DR @ weight_1R[0]
  return Ridge(
    weight_D, float(bias_1[0] - mean_D @ weight_D), float(c), validation_auc
  )


def fit(
  x_PR: np.ndarray, labels_P: np.ndarray, share_BP: np.ndarray, c_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Minimises C sum(share * nats) + |weight|^2 / 2 for B pairs of both.

  Args:
    x_PR: inputs.
    labels_P: 0 or 1.
    share_BP: how much each prompt counts, such as 0 for those left out.
    c_B: strengths.

  Returns:
    weight_BR and bias_B.
  """
  x_PR1 = np.column_stack([x_PR, np.ones(len(x_PR))])
  penalty_BR1 = np.repeat(1 / c_B[:, None], x_PR1.shape[1], 1)
  # So little that it shows only where no prompt has any curvature left.
  penalty_BR1[:, -1] = 1e-12

  def losses(theta_BR1, some):
    logit_BP = theta_BR1 @ x_PR1.T
    nats_BP = np.logaddexp(0, logit_BP) - labels_P * logit_BP
    penalty_B = (penalty_BR1[some] * theta_BR1**2).sum(1) / 2
    return (share_BP[some] * nats_BP).sum(1) + penalty_B

  theta_BR1 = np.zeros((len(c_B), x_PR1.shape[1]))
  left = np.arange(len(c_B))
  loss_B = losses(theta_BR1, left)
  for _ in range(_MAX_STEPS):
    logit_BP = theta_BR1[left] @ x_PR1.T
    p_BP, q_BP = special.expit(logit_BP), special.expit(-logit_BP)
    error_BP = share_BP[left] * np.where(labels_P == 1, -q_BP, p_BP)
    grad_BR1 = error_BP @ x_PR1 + penalty_BR1[left] * theta_BR1[left]
    curvature_BP = share_BP[left] * p_BP * q_BP
    hess_BRR = (x_PR1.T * curvature_BP[:, None]) @ x_PR1
    diagonal = np.arange(x_PR1.shape[1])
    hess_BRR[:, diagonal, diagonal] += penalty_BR1[left]
    step_BR1 = np.linalg.solve(hess_BRR, grad_BR1[..., None])[..., 0]
    gain_B = (grad_BR1 * step_BR1).sum(1) / 2
    theta_BR1[left], loss_B[left] = _moved(
      lambda theta_BR1, some, of=left: losses(theta_BR1, of[some]),
      theta_BR1[left],
      loss_B[left],
      step_BR1,
      gain_B,
    )
    left = left[gain_B > _CONVERGED]
    if not len(left):
      break
  return theta_BR1[:, :-1], theta_BR1[:, -1]


def _moved(losses, theta_BR, loss_B, step_BR, gain_B):
  """Takes steps, halved until each lowers its loss in proportion (Armijo)."""
  theta_BR, loss_B = theta_BR.copy(), loss_B.copy()
  left, share = np.arange(len(loss_B)), 1.0
  for _ in range(_HALVINGS):
    tried_BR = theta_BR[left] - share * step_BR[left]
    tried_B = losses(tried_BR, left)
    is_lower_B = tried_B <= loss_B[left] - 1e-4 * share * gain_B[left]
    # Where the gain is less than the loss's rounding any step will do.
    is_lower_B |= gain_B[left] < _CONVERGED
    taken = left[is_lower_B]
    theta_BR[taken], loss_B[taken] = tried_BR[is_lower_B], tried_B[is_lower_B]
    left, share = left[~is_lower_B], share / 2
    if not len(left):
      break
  return theta_BR, loss_B


def _folds(labels_P: np.ndarray, seed: int) -> np.ndarray:
  """Which prompts are left out, one row a fold; none if they are too few."""
  n_prompts = len(labels_P)
  by_label = [np.flatnonzero(labels_P == label) for label in (0, 1)]
  if n_prompts <= _LEAVE_PAIRS_OUT:
    left_out = [list(pair) for pair in itertools.product(*by_label)]
  elif n_prompts < _FOLD_PROMPTS:
    rng = np.random.default_rng(seed)
    by_label = [rng.permutation(members) for members in by_label]
    left_out = [
      np.concatenate([members[fold::_FOLDS] for members in by_label])
      for fold in range(_FOLDS)
    ]
  else:
    n_held_out = min(int(_HELD_OUT * n_prompts), _MOST_HELD_OUT)
    left_out = [np.arange(n_prompts - n_held_out, n_prompts)]
  rows_FP = np.zeros((len(left_out), n_prompts), bool)
  for row_P, members in zip(rows_FP, left_out):
    row_P[members] = True
  n_ones = labels_P.sum()
  # Both classes must be fitted, and both left out.
  is_good_F = [
    0 < labels_P[row_P].sum() < min(row_P.sum(), n_ones)
    and labels_P[~row_P].sum() < (~row_P).sum()
    for row_P in rows_FP
  ]
  return rows_FP[np.array(is_good_F, bool)]


def _aucs(x_PR, labels_P, left_out_FP) -> np.ndarray:
  """AUC of the prompts left out, of each fold and C."""
  n_folds = len(left_out_FP)
  weight_BR, bias_B = fit(
    x_PR,
    labels_P,
    np.repeat(~left_out_FP, len(CS), 0).astype(np.float64),
    np.tile(CS, n_folds),
  )
  logit_PB = x_PR @ weight_BR.T + bias_B
  return np.stack(
    [
      probes.auc(logit_PC[row_P], labels_P[row_P])
      for row_P, logit_PC in zip(
        left_out_FP, np.split(logit_PB, n_folds, axis=1)
      )
    ]
  )
