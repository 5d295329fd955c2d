"""Linear probes of many labels at once, dense and on a few sparse inputs.

The losses are SAEBench 0.6's: cross-entropy in which the positive examples of a
label count as much as the negative ones. Dense probes are the optimum of it,
and not where Adam is after some steps: with few examples that is far from it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from scipy import optimize

from sae_jax.probing import ridge

_BATCH = 4096
_RATE, _LAST_RATE, _DECAY = 1e-2, 1e-5, 1e-6
_MOST_STEPS, _LEAST_GRADIENT = 1000, 1e-5
# The strength of scikit-learn's penalty unless another is given.
_C = 1.0


class Probe(NamedTuple):
  """Logits of L labels: x @ weight_XL + bias_L, inputs X.

  Attributes:
    weight_XL: float32.
    bias_L: float32.
  """

  weight_XL: np.ndarray
  bias_L: np.ndarray


class Sparse(NamedTuple):
  """Probes of labels on few inputs of many.

  Attributes:
    inputs: by label, the inputs that each reads, the most telling first.
    f1_L: of each label on test examples.
  """

  inputs: list[np.ndarray]
  f1_L: np.ndarray


def dense(x_PX: np.ndarray, labels_PL: np.ndarray) -> Probe:
  """Fits probes that read all inputs, by L-BFGS.

  Args:
    x_PX: inputs of the training examples, about 1 in size.
    labels_PL: 0 or 1.
  """
  # Less their mean, which the bias could say: it is found sooner so.
  mean_X = x_PX.mean(0)
  x_PX = jnp.asarray(x_PX - mean_X)
  params, labels_PL, times_L = _start(x_PX.shape[1], labels_PL)
  flat, unflat = flatten_util.ravel_pytree(params)

  def value_and_gradient(theta):
    value, gradient = _loss_of_all(
      unflat(theta.astype(np.float32)), x_PX, labels_PL, times_L
    )
    return float(value), np.float64(flatten_util.ravel_pytree(gradient)[0])

  out = optimize.minimize(
    value_and_gradient,
    np.zeros(len(flat)),
    jac=True,
    method='L-BFGS-B',
    options={'maxiter': _MOST_STEPS, 'gtol': _LEAST_GRADIENT},
  )
  fitted = unflat(out.x.astype(np.float32))
  weight_XL = np.asarray(fitted['weight_XL'])
  return Probe(weight_XL, np.asarray(fitted['bias_L']) - mean_X @ weight_XL)


def ranked(
  vals_PK: np.ndarray,
  idx_PK: np.ndarray,
  n_inputs: int,
  labels_PL: np.ndarray,
  steps: int,
  penalty: float,
  rng: np.random.Generator,
) -> list[np.ndarray]:
  """Inputs that tell of each label, by the weights of probes with an L1 loss.

  Args:
    vals_PK: the inputs of each training example that are not 0.
    idx_PK: which they are.
    n_inputs: number of inputs, X.
    labels_PL: 0 or 1.
    steps: of Adam.
    penalty: of the mean over labels of the sum of absolute weights.
    rng: draws the batches.

  Returns:
    By label, inputs with a weight above 0, the highest first; if there are
    none the one with the highest.
  """
  batches_SB = _batches(len(vals_PK), steps, rng)
  params, labels_PL, times_L = _start(n_inputs, labels_PL)
  out = _adam(
    penalty, params, (vals_PK, idx_PK), labels_PL, times_L, batches_SB
  )
  weight_XL = np.asarray(out['weight_XL'])
  orders = np.argsort(-weight_XL, 0, kind='stable').T
  counts = np.maximum((weight_XL > 0).sum(0), 1)
  return [order[:count] for order, count in zip(orders, counts)]


def sparse(
  values: Callable[[np.ndarray], np.ndarray],
  is_test_P: np.ndarray,
  labels_PL: np.ndarray,
  orders: list[np.ndarray],
  most: int,
  least_gain: float,
) -> Sparse:
  """Probes that read one input more as long as the F1 rises by enough.

  Each is a logistic regression with an L2 penalty and balanced classes.

  Args:
    values: inputs -> their values [P, k] on all examples.
    is_test_P: the examples that the F1 is of; the others are fitted to.
    labels_PL: 0 or 1.
    orders: by label, inputs in the order in which they are added.
    most: inputs.
    least_gain: by which the F1 must rise.
  """
  inputs, scores = [], []
  for labels_P, order in zip(labels_PL.T, orders):
    best, chosen = -np.inf, order[:1]
    for k in range(1, min(most, len(order)) + 1):
      x_PK = values(order[:k]).astype(np.float64)
      says_P = _balanced(
        x_PK[~is_test_P], labels_P[~is_test_P], x_PK[is_test_P]
      )
      score = f1(says_P[:, None], labels_P[is_test_P, None])[0]
      if score <= best + least_gain:
        break
      best, chosen = score, order[:k]
    inputs.append(chosen)
    scores.append(best)
  return Sparse(inputs, np.array(scores))


def f1(predicted_PL: np.ndarray, labels_PL: np.ndarray) -> np.ndarray:
  """The F1 of each label; 0 where nothing is right."""
  predicted_PL, labels_PL = predicted_PL.astype(bool), labels_PL.astype(bool)
  right_L = (predicted_PL & labels_PL).sum(0)
  total_L = predicted_PL.sum(0) + labels_PL.sum(0)
  return 2 * right_L / np.maximum(total_L, 1)


def _balanced(x_PK, labels_P, test_PK) -> np.ndarray:
  """What a regression on some examples says of others."""
  count = np.bincount(labels_P.astype(int), minlength=2)
  if not count.all():
    return np.full(len(test_PK), bool(count[1]))
  share_P = len(labels_P) / 2 / count[labels_P.astype(int)]
  weight_1K, bias_1 = ridge.fit(x_PK, labels_P, share_P[None], np.array([_C]))
  return test_PK @ weight_1K[0] + bias_1[0] > 0


def _batches(count: int, steps: int, rng) -> np.ndarray:
  """Examples of each step: all, or those of one order after another."""
  size = min(_BATCH, count)
  if size == count:
    return np.tile(np.arange(count), (steps, 1))
  # What an order has left over at its end is of no step.
  per_order = count // size
  orders = [
    rng.permutation(count)[: per_order * size].reshape(per_order, size)
    for _ in range(-(-steps // per_order))
  ]
  return np.concatenate(orders)[:steps]


def _start(n_inputs: int, labels_PL):
  """Weights of 0, labels, and how often each positive one counts."""
  labels_PL = np.asarray(labels_PL, np.float32)
  positive_L = labels_PL.sum(0)
  times_L = (len(labels_PL) - positive_L) / np.maximum(positive_L, 1)
  params = {
    'weight_XL': np.zeros((n_inputs, labels_PL.shape[1]), np.float32),
    'bias_L': np.zeros(labels_PL.shape[1], np.float32),
  }
  return params, labels_PL, times_L


def _nats(logit_BL, labels_BL, times_L):
  """The mean loss."""
  return jnp.where(
    labels_BL > 0,
    times_L * jax.nn.softplus(-logit_BL),
    jax.nn.softplus(logit_BL),
  ).mean()


@jax.jit
@jax.value_and_grad
def _loss_of_all(params, x_PX, labels_PL, times_L):
  weight_XL, bias_L = params['weight_XL'], params['bias_L']
  product_PL = jnp.matmul(x_PX, weight_XL, precision=jax.lax.Precision.HIGHEST)
  decay = _DECAY / 2 * jnp.square(weight_XL).sum()
  return _nats(product_PL + bias_L, labels_PL, times_L) + decay


@jax.jit
def _adam(penalty, params, codes, labels_PL, times_L, batches_SB):
  """Sparse probes after Adam's steps from weights of 0."""
  rate = optax.exponential_decay(_RATE, len(batches_SB), _LAST_RATE / _RATE)
  optimizer = optax.chain(
    optax.add_decayed_weights(_DECAY),
    optax.scale_by_adam(),
    optax.scale_by_learning_rate(rate),
  )

  def loss(params, rows_B):
    vals_BK, idx_BK = (of[rows_B] for of in codes)
    logit_BL = (vals_BK[..., None] * params['weight_XL'][idx_BK]).sum(1)
    size = jnp.abs(params['weight_XL']).sum(0).mean()
    nats = _nats(logit_BL + params['bias_L'], labels_PL[rows_B], times_L)
    return nats + penalty * size

  def step(carry, rows_B):
    params, state = carry
    gradient = jax.grad(loss)(params, rows_B)
    updates, state = optimizer.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), None

  start = params, optimizer.init(params)
  (params, _), _ = jax.lax.scan(step, start, batches_SB)
  return params
