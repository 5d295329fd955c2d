"""Logistic regressions on one column each, thousands of columns at once.

p(label 1) = sigmoid(weight * x + bias), without a penalty, by Newton-Raphson in
a trust region. All that a step needs comes from one reading of the columns, and
columns that have converged are left out of the next steps.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import os
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.tpu import target

# Numbers of prompts are multiples of it: those beyond the last have no label.
PROMPTS = 32

_HESSIAN_FLOOR = 1e-4
_MAX_STEPS = 64
_TINY = 1e-20
# The trust region bounds how far any prompt's logit moves in one step.
_FIRST_RADIUS = 4.0
# The predicted gain in nats below which a Newton step is the last one.
_CONVERGED = 1e-9
# A rise in loss that float32 rounding alone can cause.
_ROUNDING = 5e-7
# Added to the margin of a prompt without a label, so that it has no loss.
_FAR = 100.0
# Each time fewer columns than this share are left, they go on by themselves.
_LEFT = 16
_STAGES = 2
# Elements that a CPU reads at a time: the steps between stay in its cache, and
# XLA does not split so few over threads.
_CPU_ELEMENTS = 2048
_CPU_COLUMNS = 256
_COLUMNS = 8192

_Result = TypeVar('_Result')


class _Columns(NamedTuple):
  """Columns in units of their spread about their mean, and their range."""

  z_PS: jax.Array
  low_S: jax.Array
  high_S: jax.Array


class _State(NamedTuple):
  """A fit, the Newton step from there, and how far a prompt may move.

  `centre_S` is about where the curvature lies: sums about it do not cancel.
  """

  weight_S: jax.Array
  bias_S: jax.Array
  ce_S: jax.Array
  step_weight_S: jax.Array
  step_bias_S: jax.Array
  reach_S: jax.Array
  gain_S: jax.Array
  centre_S: jax.Array
  radius_S: jax.Array


class _Sums(NamedTuple):
  """Mean loss, and of its derivatives in the logit the mean, that times the
  distance from a centre, and (of the second) that times its square."""

  ce_S: jax.Array
  first_S: jax.Array
  first_away_S: jax.Array
  second_S: jax.Array
  second_away_S: jax.Array
  second_away2_S: jax.Array


def columns() -> int:
  """The number of columns to give to `fit` at a time on this machine."""
  return _CPU_COLUMNS if target.platform() == 'cpu' else _COLUMNS


def on_cores(
  work: Callable[[int], _Result], n_blocks: int, n_devices: int = 1
) -> list[_Result]:
  """Calls for each block of columns in turn, or on a CPU for several at once.

  A CPU runs so small a program on one core.

  Args:
    work: starts a block by its number and returns arrays.
    n_blocks: number of blocks.
    n_devices: number of devices that a call uses.
  """
  if n_devices > 1 or target.platform() != 'cpu':
    return [work(block) for block in range(n_blocks)]
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    done = pool.map(
      lambda block: jax.block_until_ready(work(block)), range(n_blocks)
    )
    return list(done)


def padded(n_prompts: int) -> int:
  """The least number of rows for so many prompts that programs exist for.

  A multiple of `PROMPTS`, at most an eighth above the number or `PROMPTS`.
  """
  step = max(PROMPTS, (1 << n_prompts.bit_length()) // 16)
  return -(-n_prompts // step) * step


def signs(labels_P, n_rows: int) -> np.ndarray:
  """Labels 0 and 1 as float32 -1 and 1, and 0 for rows that are no prompt."""
  signs_P = np.zeros(n_rows, np.float32)
  signs_P[: len(labels_P)] = 2 * np.asarray(labels_P) - 1
  return signs_P


def fit(
  groups: Sequence[tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Fits columns to sets of labels, each group's columns to each of its sets.

  Where a column separates the classes the fit stops at a large finite weight.
  A column that is constant, or has any value that is not finite, gets weight 0
  and the constant prediction.

  Args:
    groups: x_PS, a column for each regression, and signs_LP, for each set of
      labels -1 or 1, or 0 in all sets where a row is no prompt. P is a multiple
      of `PROMPTS`, and it and S are the same in all groups.

  Returns:
    weight_LS and bias_LS in the columns' own units, and ce_LS, the mean
    cross-entropy in nats; L counts the sets of all groups in their order.
  """
  # One program is compiled for all: what a CPU takes to copy is less.
  regressions = []
  for x_PS, signs_LP in groups:
    standard = _standardise(x_PS, signs_LP[0] != 0)
    regressions += [(x_PS, *standard, signs_P) for signs_P in signs_LP]
  regressions = jax.tree.map(lambda *a: jnp.stack(a), *regressions)
  return jax.lax.map(lambda regression: _fit(*regression), regressions)


def _fit(x_PS, standard, shift_S, scale_S, signs_P):
  weight_S, bias_S = _fit_standard(standard, signs_P)
  weight_S /= scale_S
  bias_S -= weight_S * shift_S
  # Not 0 * inf: a column without weight predicts whatever it holds.
  known_PS = jnp.where(weight_S == 0, 0.0, x_PS)
  # The loss of what is returned, which the change of units has rounded.
  return weight_S, bias_S, _losses(known_PS, signs_P, weight_S, bias_S)


def _standardise(x_PS, is_prompt_P):
  """The columns standardised, and their shift and scale."""
  is_prompt_P1 = is_prompt_P[:, None]
  count = is_prompt_P.sum()
  x_PS = jnp.where(is_prompt_P1, x_PS, 0.0)
  tiny, eps = jnp.finfo(jnp.float32).tiny, jnp.finfo(jnp.float32).eps
  # Of values scaled to at most 1, neither sum nor square overflows.
  is_finite_S = jnp.isfinite(x_PS).all(0)
  x_PS = jnp.where(is_finite_S, x_PS, 0.0)
  largest_S = jnp.maximum(jnp.abs(x_PS).max(0), tiny)
  unit_PS = x_PS / largest_S
  mean_S = unit_PS.sum(0) / count
  away_PS = unit_PS - mean_S
  # The mean is taken twice: that of values far from zero is rounded.
  more_S = jnp.where(is_prompt_P1, away_PS, 0.0).sum(0) / count
  square_S = jnp.where(is_prompt_P1, away_PS**2, 0.0).sum(0) / count
  low_S = jnp.where(is_prompt_P1, away_PS, jnp.inf).min(0) - more_S
  high_S = jnp.where(is_prompt_P1, away_PS, -jnp.inf).max(0) - more_S
  # A spread of rounding errors, or too small to divide by, counts as none.
  reach_S = jnp.maximum(-low_S, high_S)
  is_usable_S = is_finite_S & (reach_S > 8 * eps)
  is_usable_S &= reach_S * largest_S > 1e-30
  spread_S = jnp.sqrt(jnp.maximum(square_S - more_S**2, 0.0))
  spread_S = jnp.where(is_usable_S, spread_S, jnp.inf)
  z_PS = jnp.where(is_prompt_P1, (away_PS - more_S) / spread_S, 0.0)
  return (
    _Columns(z_PS, low_S / spread_S, high_S / spread_S),
    jnp.where(is_usable_S, (mean_S + more_S) * largest_S, 0.0),
    spread_S * largest_S,
  )


def _fit_standard(standard: _Columns, signs_P):
  """Weights and biases of the standardised columns."""
  state, step = _start(standard, signs_P), jnp.asarray(0)
  width = standard.z_PS.shape[1]
  for stage in range(_STAGES):
    left = width // _LEFT if stage < _STAGES - 1 else 0
    if not stage:
      state, step = _improve(standard, signs_P, state, step, left)
    elif width:
      place_S = jnp.argsort(state.gain_S <= _CONVERGED)[:width]
      columns_left = _Columns(*(a[..., place_S] for a in standard))
      part = jax.tree.map(lambda a, p=place_S: a[p], state)
      part, step = _improve(columns_left, signs_P, part, step, left)
      state = jax.tree.map(lambda a, b, p=place_S: a.at[p].set(b), state, part)
    width = left
  # The last step is so small that nothing need be checked.
  last_S = jnp.where(state.gain_S <= _CONVERGED, 1.0, 0.0)
  return (
    state.weight_S + last_S * state.step_weight_S,
    state.bias_S + last_S * state.step_bias_S,
  )


def _start(standard: _Columns, signs_P) -> _State:
  """The constant prediction, and the first step, which needs no logits."""
  z_PS = standard.z_PS
  count = jnp.abs(signs_P).sum()
  share = (signs_P > 0).sum() / count
  none_S = jnp.zeros(z_PS.shape[1])
  both = share * (1 - share)
  bias = jnp.log(share) - jnp.log1p(-share)
  sums = _Sums(
    ce_S=none_S - share * jnp.log(share) - (1 - share) * jnp.log1p(-share),
    first_S=none_S,
    # The columns sum to 0, so that it does not matter where labels have it.
    first_away_S=-(signs_P[:, None] * z_PS).sum(0) / count / 2,
    second_S=none_S + both,
    second_away_S=none_S,
    second_away2_S=both * jnp.square(z_PS).sum(0) / count,
  )
  return _state(standard, none_S, none_S + bias, none_S, sums, _FIRST_RADIUS)


def _state(standard, weight_S, bias_S, centre_S, sums, radius_S) -> _State:
  """The Newton step from a fit with these sums about a centre.

  About the curvature's own centre the Hessian is diagonal, and no determinant
  cancels for a column that is zero on most prompts. The floor is on the mean
  curvature, in the spread of the prompts that still count: on the entry itself
  it would stall a column with one outlying value.
  """
  total_S = jnp.maximum(sums.second_S, _TINY)
  away_S = sums.second_away_S / total_S
  square_S = sums.second_away2_S / total_S
  # Far from the centre a difference of squares is lost. The next step has it,
  # so that this one must not be the last.
  is_far_S = away_S**2 > 0.99 * square_S
  spread_S = jnp.where(is_far_S, 0.01 * square_S, square_S - away_S**2)
  spread_S = jnp.maximum(spread_S, _TINY)
  centre_S = centre_S + away_S
  hess_S = jnp.maximum(sums.second_S, _HESSIAN_FLOOR)
  grad_S = sums.first_away_S - away_S * sums.first_S
  step_S = -grad_S / hess_S / spread_S
  shift_S = -sums.first_S / hess_S
  ends = (
    jnp.abs(step_S * (end_S - centre_S) + shift_S)
    for end_S in (standard.low_S, standard.high_S)
  )
  gain_S = -(grad_S * step_S + sums.first_S * shift_S) / 2
  return _State(
    weight_S=weight_S,
    bias_S=bias_S,
    ce_S=sums.ce_S,
    step_weight_S=step_S,
    step_bias_S=shift_S - step_S * centre_S,
    reach_S=jnp.maximum(*ends),
    gain_S=jnp.where(is_far_S, jnp.maximum(gain_S, 2 * _CONVERGED), gain_S),
    centre_S=centre_S,
    radius_S=jnp.broadcast_to(radius_S, weight_S.shape),
  )


def _improve(standard, signs_P, state, step, left) -> tuple[_State, jax.Array]:
  """Steps until no more than `left` columns have not converged."""

  def is_unfinished(carry):
    state, step = carry
    n_left = (state.gain_S > _CONVERGED).sum()
    return (step < _MAX_STEPS) & (n_left > left)

  def improve(carry):
    state, step = carry
    share_S = state.radius_S / jnp.maximum(state.reach_S, state.radius_S)
    weight_S = state.weight_S + share_S * state.step_weight_S
    bias_S = state.bias_S + share_S * state.step_bias_S
    sums = _sums(standard.z_PS, signs_P, weight_S, bias_S, state.centre_S)
    moved = _state(
      standard, weight_S, bias_S, state.centre_S, sums, 2 * state.radius_S
    )
    stayed = state._replace(radius_S=state.radius_S / 4)
    # `<=` is false for nan, so such a step is refused as well.
    accept_S = sums.ce_S <= state.ce_S + _ROUNDING
    # Else a fit would depend on the columns beside it.
    go_on_S = state.gain_S > _CONVERGED
    state = jax.tree.map(
      lambda old_S, no_S, yes_S: jnp.where(
        go_on_S, jnp.where(accept_S, yes_S, no_S), old_S
      ),
      state,
      stayed,
      moved,
    )
    return state, step + 1

  return jax.lax.while_loop(is_unfinished, improve, (state, step))


def _sums(z_PS, signs_P, weight_S, bias_S, centre_S) -> _Sums:
  """Losses and derivatives."""

  def of_rows(z_RS, signs_R1):
    loss_S, margin_RS, small_RS = _loss_of_rows(
      z_RS, signs_R1, weight_S, bias_S
    )
    larger_RS = 1 / (1 + small_RS)
    smaller_RS = small_RS * larger_RS
    # Not y - p and p (1 - p), which round to 0 where p is close to 1.
    first_RS = -signs_R1 * jnp.where(margin_RS > 0, smaller_RS, larger_RS)
    second_RS = smaller_RS * larger_RS
    away_RS = z_RS - centre_S
    return _Sums(
      loss_S,
      first_RS.sum(0),
      (first_RS * away_RS).sum(0),
      second_RS.sum(0),
      (second_RS * away_RS).sum(0),
      (second_RS * away_RS**2).sum(0),
    )

  return _mean_over_rows(of_rows, z_PS, signs_P)


def _losses(x_PS, signs_P, weight_S, bias_S) -> jax.Array:
  """Losses alone."""
  return _mean_over_rows(
    lambda *rows: _loss_of_rows(*rows, weight_S, bias_S)[0], x_PS, signs_P
  )


def _loss_of_rows(x_RS, signs_R1, weight_S, bias_S):
  """Summed loss, and each prompt's margin and exp(-|margin|)."""
  margin_RS = signs_R1 * (weight_S * x_RS + bias_S)
  margin_RS += jnp.where(signs_R1 == 0, _FAR, 0.0)
  small_RS = jnp.exp(-jnp.abs(margin_RS))
  # The logarithm of a product of few factors from 1 to 2, and not of each.
  rows, width = x_RS.shape
  factors_RS = (1 + small_RS).reshape(-1, min(rows, PROMPTS), width)
  softplus_S = jnp.log(factors_RS.prod(1)).sum(0)
  loss_S = softplus_S + jnp.maximum(-margin_RS, 0.0).sum(0)
  return loss_S, margin_RS, small_RS


def _mean_over_rows(of_rows, x_PS, signs_P):
  """Sums over a few rows at a time, over the number of prompts."""
  n_rows, width = x_PS.shape
  rows = n_rows
  if target.platform() == 'cpu':
    rows = max(1, min(PROMPTS, _CPU_ELEMENTS // width))
    rows = 1 << (rows.bit_length() - 1)

  def more(step):
    x_RS = jax.lax.dynamic_slice_in_dim(x_PS, step * rows, rows)
    signs_R = jax.lax.dynamic_slice_in_dim(signs_P, step * rows, rows)
    return of_rows(x_RS, signs_R[:, None])

  sums = jax.tree.map(
    lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(more, 0)
  )
  sums = jax.lax.fori_loop(
    0,
    n_rows // rows,
    lambda step, sums: jax.tree.map(jnp.add, sums, more(step)),
    sums,
  )
  count = jnp.abs(signs_P).sum()
  return jax.tree.map(lambda sum_S: sum_S / count, sums)
