"""Baselines: principal components for reconstruction, controls for probes."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from sae_jax import errors
from sae_jax.probing import probes

# The meaning of each control of a task, for readers of the report.
CONTROL_DEFINITIONS = {
  'permuted': 'The best latent after the labels were shuffled: what chance '
  'gives.',
  'random': 'The best of as many random directions as there are latents.',
  'channel': 'The best single channel of the activation.',
  'pca': "The best principal direction of the prompts' activations.",
}


class PcaState(NamedTuple):
  """Rows seen so far: their number, mean and scatter about that mean.

  All float64 on the host: over millions of rows a float32 scatter loses the
  small eigenvalues, on which a reconstruction of high rank depends.
  """

  count: int
  mean_D: np.ndarray
  scatter_DD: np.ndarray


class Pca(NamedTuple):
  """Principal components, strongest first.

  Attributes:
    mean_D: float64 mean of the rows.
    components_KD: float64 orthonormal rows.
    variance_K: float64 variance of the rows along each component.
    total_variance: variance summed over all D directions, kept or not.
  """

  mean_D: np.ndarray
  components_KD: np.ndarray
  variance_K: np.ndarray
  total_variance: float


def empty_state(d_model: int) -> PcaState:
  """The state before any row."""
  return PcaState(0, np.zeros(d_model), np.zeros((d_model, d_model)))


def accumulate(state: PcaState, x_BD) -> PcaState:
  """The state with the rows of one batch added.

  Each batch is centred on its own mean before its squares are summed (Chan,
  Golub and LeVeque 1983), so that a large mean costs no precision.

  Raises:
    UserError: if the batch has another width or a value is not finite.
  """
  x_BD = np.asarray(x_BD, np.float64)
  d_model = state.mean_D.shape[0]
  if x_BD.ndim != 2 or x_BD.shape[1] != d_model:
    raise errors.UserError(
      f'a batch for PCA has shape {x_BD.shape}: give rows of width {d_model}'
    )
  if not len(x_BD):
    return state
  mean_D = x_BD.mean(0)
  if not np.isfinite(mean_D).all():
    raise errors.UserError(
      f'{np.count_nonzero(~np.isfinite(x_BD).all(1))} of {len(x_BD)} rows for '
      'PCA hold values that are not finite: mask them first'
    )
  x_BD = x_BD - mean_D
  count = state.count + len(x_BD)
  shift_D = mean_D - state.mean_D
  weight = state.count * len(x_BD) / count
  return PcaState(
    count,
    state.mean_D + shift_D * (len(x_BD) / count),
    state.scatter_DD + x_BD.T @ x_BD + weight * np.outer(shift_D, shift_D),
  )


def fit_pca(batches: Iterable, n_components: int | None = None) -> Pca:
  """Principal components of a stream of batches, in one pass.

  Args:
    batches: arrays [B, D] of any float type, B may vary.
    n_components: number of components to keep; None for all that the rows
      span.

  Raises:
    UserError: if there are fewer than two rows, or `n_components` is more
      than the rows can span.
  """
  state = None
  for x_BD in batches:
    if state is None:
      state = empty_state(np.shape(x_BD)[-1])
    state = accumulate(state, x_BD)
  return principal(state or empty_state(0), n_components)


def principal(state: PcaState, n_components: int | None = None) -> Pca:
  """Principal components of rows, from their mean and scatter.

  Args:
    state: from `accumulate`.
    n_components: see `fit_pca`.

  Raises:
    UserError: see `fit_pca`.
  """
  count = state.count
  if count < 2:
    raise errors.UserError(f'PCA of {count} rows: give at least 2')
  rank = min(count - 1, len(state.mean_D))
  n_components = rank if n_components is None else n_components
  if not 0 < n_components <= rank:
    raise errors.UserError(
      f'n_components {n_components} must be from 1 to {rank} for {count} rows '
      f'of width {len(state.mean_D)}'
    )
  variance_D, vectors_DD = np.linalg.eigh(state.scatter_DD / count)
  # Rounding leaves eigenvalues a little below zero where there is no variance.
  variance_D = np.maximum(variance_D[::-1], 0.0)
  return Pca(
    mean_D=state.mean_D,
    components_KD=vectors_DD.T[::-1][:n_components],
    variance_K=variance_D[:n_components],
    total_variance=float(variance_D.sum()),
  )


def pca_fvu(pca: Pca, batches: Iterable) -> np.ndarray:
  """Fraction of variance unexplained, for each number of components kept.

  FVU is the squared error over these rows' own variance: 1 for always
  predicting their mean. On rows that are not those of the fit, the entry for 0
  components is a little over 1, as the fitted mean is not theirs.

  Args:
    pca: from `fit_pca`.
    batches: arrays [B, D] of the rows to score, held out from the fit.

  Returns:
    float64 [K + 1]: entry k is the FVU with the first k components.

  Raises:
    UserError: if the rows are fewer than two or all alike.
  """
  seen = empty_state(len(pca.mean_D))
  for x_BD in batches:
    seen = accumulate(seen, x_BD)
  return fvu(pca, seen)


def fvu(pca: Pca, seen: PcaState) -> np.ndarray:
  """`pca_fvu` of rows of which mean and scatter are known."""
  variance = np.trace(seen.scatter_DD)
  if not variance > 0:
    raise errors.UserError(
      f'FVU of {seen.count} rows without variance: give at least 2 that differ'
    )
  # The scatter gives squared distances from the fitted mean, along each
  # component and in all, so that the rows need not be kept.
  shift_D = seen.mean_D - pca.mean_D
  along_K = np.einsum(
    'kd,kd->k', pca.components_KD @ seen.scatter_DD, pca.components_KD
  )
  along_K += seen.count * (pca.components_KD @ shift_D) ** 2
  error = variance + seen.count * shift_D @ shift_D
  error_K1 = error - np.concatenate([[0.0], np.cumsum(along_K)])
  return np.maximum(error_K1, 0.0) / variance


def of_activations(
  train_x_PD, train_labels_P, test_x_PD, test_labels_P
) -> dict[str, probes.TaskScore]:
  """Scores a task by `probes.score_task` on activations themselves.

  Args:
    train_x_PD, test_x_PD: pooled activations, as the autoencoder reads them.
    train_labels_P, test_labels_P: 0 or 1, both present.

  Returns:
    Scores by name: `channel` (single channels of the activations) and `pca`
    (principal directions of the training prompts).
  """
  train_x_PD = np.asarray(train_x_PD, np.float32)
  test_x_PD = np.asarray(test_x_PD, np.float32)
  mean_D = train_x_PD.mean(0, dtype=np.float64)
  # Centred first: float32 would lose the signal under a large common mean.
  train_PD, test_PD = train_x_PD - mean_D, test_x_PD - mean_D
  # As `fit_pca`, but prompts are few: no matrix of D by D is needed.
  components_KD = np.linalg.svd(train_PD, full_matrices=False)[2]
  components_KD = components_KD[: len(train_PD) - 1]
  pairs = {
    'channel': (train_x_PD, test_x_PD),
    'pca': (train_PD @ components_KD.T, test_PD @ components_KD.T),
  }
  return {
    name: probes.score_task(train_PN, train_labels_P, test_PN, test_labels_P)
    for name, (train_PN, test_PN) in pairs.items()
  }
