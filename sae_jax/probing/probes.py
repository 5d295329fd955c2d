"""One-dimensional logistic probes on every latent of a task at once.

The probe-loss metric of Gao et al. 2024 (arXiv 2406.04093): fit
p = sigmoid(weight * feature + bias) for each latent and score a task by the
best latent's cross-entropy. The best of N on the training prompts is biased
low, so a task's score here is that latent's loss on held-out prompts, shown
beside controls that had the same freedom of choice.
"""

from typing import NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import errors
from sae_jax.probing import intervals, newton

# Elements of one chunk of features, which bounds the memory that a score takes.
_CHUNK_ELEMENTS = 1 << 22
# Columns are fitted in multiples of so many, so that few programs serve all.
_WIDTH = 256
# Losses that differ by less, in nats, are equal: float32 rounds as much.
_NEAR_TIE = 1e-6


class Probes(NamedTuple):
  """A logistic probe per latent: p(label 1) = sigmoid(weight * x + bias).

  Attributes:
    weight_N: float32 slope in the feature's own units.
    bias_N: float32 intercept.
    train_ce_N: float32 mean cross-entropy on the training prompts, in nats.
  """

  weight_N: np.ndarray
  bias_N: np.ndarray
  train_ce_N: np.ndarray


class TaskScore(NamedTuple):
  """How well the best single latent solves a task.

  Attributes:
    best_latent: the latent with the least training cross-entropy.
    train_ce: that training cross-entropy (nats): the least of N, biased low.
    test_ce: the same probe's cross-entropy on held-out prompts (nats).
    test_auc: area under the held-out ROC curve of the probe's logit.
    test_auc_low, test_auc_high: 95 % interval of `test_auc` over the held-out
      prompts, for this latent as chosen.
    prevalence_ce: held-out cross-entropy (nats) of always predicting the
      training share of label 1.
  """

  best_latent: int
  train_ce: float
  test_ce: float
  test_auc: float
  test_auc_low: float
  test_auc_high: float
  prevalence_ce: float


def fit_probes(feature_PN, labels_P) -> Probes:
  """Fits a probe to every column by `newton.fit`.

  The loss has no penalty, so this is the maximum-likelihood fit where that is
  finite. Where a column separates the classes the fit stops at a large finite
  weight. A column that is constant, or has any value that is not finite, gets
  weight 0 and the constant prediction.

  Args:
    feature_PN: one column per latent, any float type; its pre-activations in
      the paper's metric.
    labels_P: 0 or 1, both present.

  Returns:
    Probes, as host arrays.

  Raises:
    UserError: if shapes do not match or the labels are not both 0 and 1.
  """
  labels_P = checked_labels(np.shape(feature_PN), labels_P)
  n_prompts, n_latents = np.shape(feature_PN)
  signs_LP = newton.signs(labels_P, newton.padded(n_prompts))[None]
  width = min(newton.columns(), -(-n_latents // _WIDTH) * _WIDTH)
  width = max(width, 1)

  def fit(block):
    x_PS = np.asarray(
      feature_PN[:, block * width : (block + 1) * width], np.float32
    )
    more = (signs_LP.shape[1] - n_prompts, width - x_PS.shape[1])
    return _fit(np.pad(x_PS, [(0, n) for n in more]), signs_LP)

  parts = newton.on_cores(fit, -(-n_latents // width))
  empty = np.zeros((1, 0), np.float32)
  weight_N, bias_N, ce_N, is_finite_N = (
    np.concatenate([empty, *arrays], 1)[0, :n_latents]
    for arrays in (zip(*parts) if parts else [()] * 4)
  )
  warn_of(int(np.count_nonzero(is_finite_N == 0)), n_latents)
  return Probes(weight_N, bias_N, ce_N)


def probe_loss(
  probes: Probes, feature_PN, labels_P, chunk_elements: int = _CHUNK_ELEMENTS
) -> np.ndarray:
  """Mean cross-entropy of each probe on given prompts.

  Args:
    probes: from `fit_probes`.
    feature_PN: the same latents on these prompts.
    labels_P: 0 or 1.
    chunk_elements: as in `fit_probes`.

  Returns:
    float32 ce_N in nats. A feature that is not finite makes its latent's loss
    nan or inf, unless the weight is 0.
  """
  labels_P = checked_labels(np.shape(feature_PN), labels_P, both=False)
  y_P = jnp.asarray(labels_P, jnp.float32)
  losses, start = [np.zeros(0, np.float32)], 0
  for x_PS in _chunks(feature_PN, chunk_elements):
    columns = slice(start, start + x_PS.shape[1])
    start = columns.stop
    weight_S, bias_S = probes.weight_N[columns], probes.bias_N[columns]
    losses.append(np.asarray(_loss_chunk(weight_S, bias_S, x_PS, y_P)))
  return np.concatenate(losses)


def auc(
  feature_PN, labels_P, chunk_elements: int = _CHUNK_ELEMENTS
) -> np.ndarray:
  """Area under the ROC curve of every column, exact, ties counted half.

  The probability that a random prompt with label 1 has the larger feature,
  from average ranks (Mann and Whitney 1947), in float64 on the host.

  Args:
    feature_PN: scores, one column per latent.
    labels_P: 0 or 1, both present.
    chunk_elements: as in `fit_probes`.

  Returns:
    float64 auc_N; nan for a column that holds a nan.

  Raises:
    UserError: as in `fit_probes`.
  """
  labels_P = checked_labels(np.shape(feature_PN), labels_P)
  n_ones = int(labels_P.sum())
  n_zeros = len(labels_P) - n_ones
  place_P1 = np.arange(len(labels_P))[:, None]
  aucs = [np.zeros(0)]
  for x_PS in _chunks(feature_PN, chunk_elements, np.float64):
    order_PS = np.argsort(x_PS, 0)
    sorted_PS = np.take_along_axis(x_PS, order_PS, 0)
    is_new_PS = np.ones(x_PS.shape, bool)
    is_new_PS[1:] = sorted_PS[1:] != sorted_PS[:-1]
    first_PS = np.maximum.accumulate(np.where(is_new_PS, place_P1, 0), 0)
    is_last_PS = np.ones(x_PS.shape, bool)
    is_last_PS[:-1] = is_new_PS[1:]
    last_PS = np.where(is_last_PS, place_P1, len(labels_P))
    last_PS = np.minimum.accumulate(last_PS[::-1], 0)[::-1]
    # Ranks count from 1; tied values share the mean of the ranks they span.
    rank_PS = (first_PS + last_PS) / 2 + 1
    sum_S = np.where(labels_P[order_PS], rank_PS, 0).sum(0)
    auc_S = (sum_S - n_ones * (n_ones + 1) / 2) / (n_ones * n_zeros)
    aucs.append(np.where(np.isnan(x_PS).any(0), np.nan, auc_S))
  return np.concatenate(aucs)


def score_task(
  train_feature_PN,
  train_labels_P,
  test_feature_PN,
  test_labels_P,
) -> TaskScore:
  """Picks the best column on the training prompts, scores it on held-out ones.

  Args:
    train_feature_PN: one column per latent.
    train_labels_P: 0 or 1, both present.
    test_feature_PN: the same latents on other prompts.
    test_labels_P: 0 or 1, both present.

  Raises:
    UserError: if shapes do not match or a class is missing.
  """
  n_train, n_test = np.shape(train_feature_PN)[1], np.shape(test_feature_PN)[1]
  if not n_train or n_train != n_test:
    raise errors.UserError(
      f'train features of {n_train} latents, test features of {n_test}: '
      'give the same ones, at least one'
    )
  probes = fit_probes(train_feature_PN, train_labels_P)
  (best,) = best_first(probes.train_ce_N, np.arange(n_train), 1)
  chosen = Probes(*(a[best : best + 1] for a in probes))
  return held_out(
    best, chosen, train_labels_P, test_feature_PN[:, best], test_labels_P
  )


def best_first(
  ce_Q: np.ndarray, column_Q: np.ndarray, n_best: int
) -> np.ndarray:
  """Places of the probes with the least loss, best first.

  Losses that differ by less than rounding count as equal, and the lower column
  comes first: which is the least would else depend on the machine and on the
  devices that share the columns.

  Args:
    ce_Q: training losses.
    column_Q: the columns that they are of.
    n_best: number of places.
  """
  left_Q = np.array(ce_Q, np.float64)
  order = []
  for _ in range(min(n_best, len(left_Q))):
    ties = np.flatnonzero(left_Q <= left_Q.min() + _NEAR_TIE)
    order.append(ties[np.argmin(column_Q[ties])])
    left_Q[order[-1]] = np.inf
  return np.array(order, np.int64)


def held_out(
  column: int, probe: Probes, train_labels_P, feature_P, labels_P
) -> TaskScore:
  """Scores one probe that was chosen on the training prompts on others.

  Args:
    column: the latent that it is of.
    probe: it alone.
    train_labels_P: labels it was fitted to.
    feature_P: the latent on held-out prompts.
    labels_P: their labels.
  """
  feature_P1 = np.asarray(feature_P, np.float32)[:, None]
  # A probe with negative weight ranks by the feature's opposite; without
  # weight it ranks nothing.
  score_P = np.sign(probe.weight_N[0]) * feature_P1[:, 0]
  low, high = intervals.auc_interval(score_P, labels_P)
  share = np.mean(train_labels_P, dtype=np.float64)
  test_share = np.mean(labels_P, dtype=np.float64)
  return TaskScore(
    best_latent=int(column),
    train_ce=float(probe.train_ce_N[0]),
    test_ce=float(probe_loss(probe, feature_P1, labels_P)[0]),
    test_auc=float(auc(score_P[:, None], labels_P)[0]),
    test_auc_low=low,
    test_auc_high=high,
    prevalence_ce=float(
      -test_share * np.log(share) - (1 - test_share) * np.log1p(-share)
    ),
  )


def warn_of(n_bad: int, n_columns: int) -> None:
  """Tells of columns that got no probe."""
  if n_bad:
    logging.warning(
      '%d of %d features hold values that are not finite and got no probe',
      n_bad,
      n_columns,
    )


def checked_labels(
  shape: tuple[int, ...], labels_P, both: bool = True
) -> np.ndarray:
  """The labels of features of this shape, as int32.

  Raises:
    UserError: unless there is one for each prompt, and all are 0 or 1, and
      with `both`, there are some of each.
  """
  labels_P = np.asarray(labels_P)
  if len(shape) != 2 or labels_P.shape != shape[:1]:
    raise errors.UserError(
      f'features of shape {shape} and labels of shape {labels_P.shape}: '
      'give features [P, N] and labels [P]'
    )
  n_zeros, n_ones = np.sum(labels_P == 0), np.sum(labels_P == 1)
  if n_zeros + n_ones != len(labels_P) or (both and not n_zeros * n_ones):
    raise errors.UserError(
      f'{len(labels_P)} labels hold {n_zeros} zeros and {n_ones} ones: '
      'give zeros and ones alone, both of them'
    )
  return labels_P.astype(np.int32)


def _chunks(feature_PN, chunk_elements: int, dtype=np.float32):
  """Blocks of columns, as host arrays."""
  n_prompts, n_latents = np.shape(feature_PN)
  width = max(1, chunk_elements // max(1, n_prompts))
  for start in range(0, n_latents, width):
    yield np.asarray(feature_PN[:, start : start + width], dtype)


@jax.jit
def _fit(x_PS, signs_LP):
  """Weights, biases, losses, and whether columns are finite, [1, S] each."""
  return *newton.fit([(x_PS, signs_LP)]), jnp.isfinite(x_PS).all(0)[None]


@jax.jit
def _loss_chunk(weight_S, bias_S, x_PS, y_P):
  # Not 0 * nan: a latent without weight predicts whatever its feature is.
  logit_PS = jnp.where(weight_S == 0, 0.0, weight_S * x_PS) + bias_S
  return _cross_entropy(logit_PS, y_P[:, None]).mean(0)


def _cross_entropy(logit, y):
  return jax.nn.softplus(logit) - y * logit
