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
from sae_jax.probing import intervals

_HESSIAN_FLOOR = 1e-4
_MAX_STEPS = 64
_TINY = 1e-20
# The trust region bounds how far any prompt's logit moves in one step.
_FIRST_RADIUS = 4.0
# The predicted gain in nats below which a Newton step changes nothing.
_CONVERGED = 1e-12
# A rise in loss that float32 rounding alone can cause.
_ROUNDING = 5e-7
# Elements of one chunk of features, which bounds the memory of a fit.
_CHUNK_ELEMENTS = 1 << 22


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


def fit_probes(
  feature_PN, labels_P, chunk_elements: int = _CHUNK_ELEMENTS
) -> Probes:
  """Fits a probe to every column by damped Newton-Raphson.

  The loss has no penalty, so this is the maximum-likelihood fit where that is
  finite. Where a column separates the classes the fit stops at a large finite
  weight. A column that is constant, or has any value that is not finite, gets
  weight 0 and the constant prediction.

  Args:
    feature_PN: one column per latent, any float type; its pre-activations in
      the paper's metric.
    labels_P: 0 or 1, both present.
    chunk_elements: features fitted at a time, P times the columns of a chunk.

  Returns:
    Probes, as host arrays.

  Raises:
    UserError: if shapes do not match or the labels are not both 0 and 1.
  """
  labels_P = _checked_labels(feature_PN, labels_P)
  y_P = jnp.asarray(labels_P, jnp.float32)
  chunks = [[np.zeros(0, np.float32)] * 3]
  n_bad = 0
  for x_PS in _chunks(feature_PN, chunk_elements):
    n_bad += np.count_nonzero(~np.isfinite(x_PS).all(0))
    chunks.append([np.asarray(a) for a in _fit_chunk(x_PS, y_P)])
  if n_bad:
    logging.warning(
      '%d of %d features hold values that are not finite and got no probe',
      n_bad,
      np.shape(feature_PN)[1],
    )
  return Probes(*(np.concatenate(arrays) for arrays in zip(*chunks)))


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
  labels_P = _checked_labels(feature_PN, labels_P, both=False)
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
  labels_P = _checked_labels(feature_PN, labels_P)
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
  """Picks the best latent on the training prompts, scores it on held-out ones.

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
  best = int(np.argmin(probes.train_ce_N))
  chosen = Probes(*(a[best : best + 1] for a in probes))
  feature_P1 = np.asarray(test_feature_PN[:, best : best + 1], np.float32)
  # A probe with negative weight ranks by the feature's opposite; without
  # weight it ranks nothing.
  score_P = np.sign(chosen.weight_N[0]) * feature_P1[:, 0]
  low, high = intervals.auc_interval(score_P, test_labels_P)
  share = np.mean(train_labels_P, dtype=np.float64)
  test_share = np.mean(test_labels_P, dtype=np.float64)
  return TaskScore(
    best_latent=best,
    train_ce=float(chosen.train_ce_N[0]),
    test_ce=float(probe_loss(chosen, feature_P1, test_labels_P)[0]),
    test_auc=float(auc(score_P[:, None], test_labels_P)[0]),
    test_auc_low=low,
    test_auc_high=high,
    prevalence_ce=float(
      -test_share * np.log(share) - (1 - test_share) * np.log1p(-share)
    ),
  )


def _checked_labels(feature_PN, labels_P, both: bool = True) -> np.ndarray:
  labels_P = np.asarray(labels_P)
  shape = np.shape(feature_PN)
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
def _fit_chunk(x_PS, y_P):
  return jax.vmap(_fit_one, in_axes=(1, None))(x_PS, y_P)


@jax.jit
def _loss_chunk(weight_S, bias_S, x_PS, y_P):
  # Not 0 * nan: a latent without weight predicts whatever its feature is.
  logit_PS = jnp.where(weight_S == 0, 0.0, weight_S * x_PS) + bias_S
  return _cross_entropy(logit_PS, y_P[:, None]).mean(0)


def _cross_entropy(logit, y):
  return jax.nn.softplus(logit) - y * logit


def _fit_one(x_P, y_P):
  """Weight, bias and loss of one column; see `fit_probes`."""
  z_P, shift, scale, is_usable = _standardise(x_P)

  def loss(weight, bias):
    return _cross_entropy(weight * z_P + bias, y_P).mean()

  def newton_step(weight, bias):
    logit_P = weight * z_P + bias
    p_P, q_P = jax.nn.sigmoid(logit_P), jax.nn.sigmoid(-logit_P)
    # Not p - y and p (1 - p), which round to 0 where p is close to 1.
    error_P = jnp.where(y_P == 1, -q_P, p_P)
    curvature_P = p_P * q_P
    # About the curvature's own centre the Hessian is diagonal, and no
    # determinant cancels for a latent that hardly fires. The floor is on the
    # mean curvature, in the spread of the prompts that still count: on the
    # entry itself it would stall a latent with one outlying value.
    total = curvature_P.mean()
    share_P = curvature_P / jnp.maximum(curvature_P.sum(), _TINY)
    centre = (share_P * z_P).sum()
    away_P = z_P - centre
    spread = jnp.maximum((share_P * away_P**2).sum(), _TINY)
    hess_bias = jnp.maximum(total, _HESSIAN_FLOOR)
    grad_weight, grad_bias = (error_P * away_P).mean(), error_P.mean()
    step_weight = -grad_weight / hess_bias / spread
    step_bias = -grad_bias / hess_bias
    gain = -(grad_weight * step_weight + grad_bias * step_bias) / 2
    reach = jnp.abs(step_weight * away_P + step_bias).max()
    return step_weight, step_bias - step_weight * centre, reach, gain

  def improve(state):
    step, weight, bias, ce, radius, _ = state
    step_weight, step_bias, reach, gain = newton_step(weight, bias)
    shrink = jnp.minimum(1.0, radius / jnp.maximum(reach, radius * 1e-3))
    new_weight = weight + shrink * step_weight
    new_bias = bias + shrink * step_bias
    new_ce = loss(new_weight, new_bias)
    # `<=` is false for nan, so such a step is refused as well.
    accept = new_ce <= ce + _ROUNDING
    return (
      step + 1,
      jnp.where(accept, new_weight, weight),
      jnp.where(accept, new_bias, bias),
      jnp.where(accept, new_ce, ce),
      jnp.where(accept, 2 * radius, radius / 4),
      gain,
    )

  def unfinished(state):
    step, *_, gain = state
    return (step < _MAX_STEPS) & (gain > _CONVERGED)

  share = y_P.mean()
  bias = jnp.log(share) - jnp.log1p(-share)
  start = (0, 0.0, bias, loss(0.0, bias), _FIRST_RADIUS, jnp.inf)
  start = jax.tree.map(jnp.asarray, start)
  _, weight, bias, _, _, _ = jax.lax.while_loop(unfinished, improve, start)
  weight = jnp.where(is_usable, weight / scale, 0.0)
  bias = bias - weight * shift
  # The loss is that of the returned weights, which the change of units rounds.
  logit_P = jnp.where(is_usable, weight * x_P, 0.0) + bias
  return weight, bias, _cross_entropy(logit_P, y_P).mean()


def _standardise(x_P):
  """x in units of its spread about its mean, and whether it has any."""
  is_finite = jnp.isfinite(x_P).all()
  x_P = jnp.where(is_finite, x_P, 0.0)
  tiny = jnp.finfo(jnp.float32).tiny
  largest = jnp.maximum(jnp.abs(x_P).max(), tiny)
  # Of values scaled to at most 1, neither sum nor square overflows. The mean
  # is taken twice, as the first one of values far from zero is rounded.
  unit_P = x_P / largest
  mean = unit_P.mean()
  mean += (unit_P - mean).mean()
  reach = jnp.abs(unit_P - mean).max()
  # A spread of rounding errors, or too small to divide by, counts as none.
  eps = jnp.finfo(jnp.float32).eps
  is_usable = is_finite & (reach > 8 * eps) & (reach * largest > 1e-30)
  reach = jnp.where(is_usable, reach, 1.0)
  away_P = jnp.where(is_usable, (unit_P - mean) / reach, 0.0)
  spread = jnp.sqrt(jnp.square(away_P).mean())
  spread = jnp.where(is_usable, spread, 1.0)
  return away_P / spread, mean * largest, spread * reach * largest, is_usable
