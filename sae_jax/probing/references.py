"""Probes that say what one latent's score is worth: of many inputs at once."""

from typing import Any

import numpy as np
from scipy import sparse

from sae_jax.probing import intervals, probes, ridge

# The meaning of each of `scores`, for readers of the report.
REFERENCE_DEFINITIONS = {
  'logistic': 'Logistic regression on the whole activation, as the autoencoder '
  'reads it, with an L2 penalty. C is the one of 10 from 1e5 to 1e-5 with the '
  'highest AUC on prompts left out of the fit: a sixth in turn of up to 127 '
  'training prompts, else the last fifth, at most 100 (sae-probes 0.4.2).',
  'mean_difference': 'The direction from the mean activation of label 0 to '
  'that of label 1, without any fit.',
  'k_sparse': 'Logistic regression as above on k latents: those whose '
  'activation, divided by its mean where it is not zero, differs most between '
  "the means of the two classes of the training prompts. A prompt's "
  'activation is that after the nonlinearity, pooled over its tokens as the '
  'activations are (sae-probes 0.4.2, which reads the last token).',
}
KS = (1, 2, 4, 8, 16, 32, 64, 128)
# sae-probes adds it to what it divides by.
_TINY = 1e-6


def scores(
  train_x_PD,
  train_codes_PN: sparse.csr_array,
  train_labels_P,
  test_x_PD,
  test_codes_PN: sparse.csr_array,
  test_labels_P,
  seed: int = 0,
) -> dict[str, Any]:
  """Scores a task by each of `REFERENCE_DEFINITIONS`.

  Args:
    train_x_PD, test_x_PD: pooled activations, as the autoencoder reads them.
    train_codes_PN, test_codes_PN: pooled activations of the latents.
    train_labels_P, test_labels_P: 0 or 1, both present.
    seed: seed of the folds of the cross-validation.

  Returns:
    `logistic` with `test_auc`, its 95 % interval over the held-out prompts,
    `test_ce` in nats, `c` and `validation_auc`; `mean_difference` with the
    first three; `k_sparse`, a list of scores like `logistic` with their `k`.
  """
  train_P, test_P = np.asarray(train_labels_P), np.asarray(test_labels_P)
  mean_D = np.mean(train_x_PD, 0, dtype=np.float64)
  train_PD, test_PD = (
    np.asarray(x_PD, np.float64) - mean_D for x_PD in (train_x_PD, test_x_PD)
  )
  direction_D = train_PD[train_P == 1].mean(0) - train_PD[train_P == 0].mean(0)
  order = by_mean_difference(train_codes_PN, train_P)[: max(KS)]
  train_PK, test_PK = (
    codes_PN[:, order].toarray() for codes_PN in (train_codes_PN, test_codes_PN)
  )
  ks = [k for k in KS if k <= train_codes_PN.shape[1]]
  return {
    'logistic': _ridge(train_PD, train_P, test_PD, test_P, seed),
    'mean_difference': _auc(test_PD @ direction_D, test_P),
    'k_sparse': [
      {'k': k} | _ridge(train_PK[:, :k], train_P, test_PK[:, :k], test_P, seed)
      for k in ks
    ],
  }


def by_mean_difference(
  codes_PN: sparse.csr_array, labels_P: np.ndarray
) -> np.ndarray:
  """Latents by how far apart the classes' mean activations are, farthest first.

  Args:
    codes_PN: pooled activations of the latents.
    labels_P: 0 or 1, both present.

  Returns:
    int64 latents; ties by latent.
  """
  codes_PN = sparse.csr_array(codes_PN, dtype=np.float64)
  n_active_N = np.bincount(codes_PN.indices, minlength=codes_PN.shape[1])
  size_N = np.asarray(abs(codes_PN).sum(0)) / (n_active_N + _TINY)
  weight_P = np.where(labels_P == 1, 1.0, -1.0)
  for label in (0, 1):
    weight_P[labels_P == label] /= np.count_nonzero(labels_P == label)
  difference_N = np.abs(codes_PN.T @ weight_P) / (size_N + _TINY)
  return np.argsort(-difference_N, kind='stable')


def _ridge(train_PK, train_P, test_PK, test_P, seed) -> dict[str, float]:
  fitted = ridge.cross_validated(train_PK, train_P, seed)
  logit_P = fitted.logits(test_PK)
  nats_P = np.logaddexp(0, logit_P) - test_P * logit_P
  return _auc(logit_P, test_P) | {
    'test_ce': float(nats_P.mean()),
    'c': fitted.c,
    'validation_auc': float(fitted.validation_auc),
  }


def _auc(score_P, labels_P) -> dict[str, float]:
  low, high = intervals.auc_interval(score_P, labels_P)
  return {
    'test_auc': float(probes.auc(score_P[:, None], labels_P)[0]),
    'test_auc_low': low,
    'test_auc_high': high,
  }
