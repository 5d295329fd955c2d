"""For a budget: the best n and tokens at each k, and the loss to expect."""

from collections.abc import Mapping
import dataclasses

import numpy as np
from scipy import optimize

from sae_jax.scaling import frontier, profile
from sae_jax.scaling.law import Law


@dataclasses.dataclass(frozen=True)
class Advice:
  """The best run at one k for a budget.

  Attributes:
    k: active latents of a token.
    n_latents: best number of latents; 0 if no law says.
    tokens: tokens to train on.
    flops: dense-equivalent.
    loss: what the law expects.
    low, high: the interval of that.
    beyond: how many times the largest n that was run n_latents is.
    basis: the law that this rests on, or why there is none.
  """

  k: int
  n_latents: int = 0
  tokens: int = 0
  flops: float = 0.0
  loss: float = np.nan
  low: float = np.nan
  high: float = np.nan
  beyond: float = np.nan
  basis: str = ''


def by_compute(
  law: Law, k: int, flops: float, d_model: int, largest: int, confidence: float
) -> Advice:
  """Advice from L(n, T) at a k."""
  best = frontier.optimum(law, flops, d_model)
  if best is None:
    return Advice(k, basis='the loss at this k does not fall with n and tokens')
  n_latents = max(round(best.n_latents), k)
  tokens = round(flops / (6.0 * d_model * n_latents))
  if tokens < 1:
    return Advice(k, basis=f'the budget is less than a token at n {n_latents}')
  figure = profile.prediction(law, n=n_latents, tokens=tokens)
  return _advice(
    law, figure, k, n_latents, tokens, flops, largest, confidence, 'L(n, T)'
  )


def by_convergence(
  loss_law: Law,
  tokens_law: Law,
  k: int,
  flops: float,
  d_model: int,
  largest: int,
  confidence: float,
) -> Advice:
  """Advice from L(n, k) and tokens to convergence, as large as the budget.

  Args:
    loss_law: of `forms.SURFACE`, of runs to convergence.
    tokens_law: of `forms.POWER`, their tokens at this k.
    k: active latents of a token.
    flops: dense-equivalent.
    d_model: width of the activations.
    largest: largest n that was run.
    confidence: of the interval.
  """

  def excess(log_n):
    n_latents = np.exp(log_n)
    tokens = tokens_law.value(n=n_latents)
    return np.log(6.0 * n_latents * d_model * tokens) - np.log(flops)

  low, high = np.log(k), np.log(1e12)
  if excess(low) > 0 or excess(high) < 0:
    return Advice(k, basis='no n converges with exactly this budget')
  n_latents = int(np.exp(optimize.brentq(excess, low, high)))
  tokens = round(float(tokens_law.value(n=n_latents)))
  figure = profile.prediction(loss_law, n=n_latents, k=k)
  return _advice(
    loss_law, figure, k, n_latents, tokens, flops, largest, confidence,
    'L(n, k) and tokens to convergence',
  )  # fmt: skip


def _advice(
  law, figure, k, n_latents, tokens, flops, largest, confidence, basis
) -> Advice:
  walked = profile.profile(law, figure, confidence)
  return Advice(
    k,
    n_latents,
    tokens,
    flops,
    walked.estimate,
    walked.low,
    walked.high,
    n_latents / largest,
    basis,
  )


def advise(
  flops: float,
  d_model: int,
  largest: int,
  compute: Mapping[int, Law],
  surface: Law | None,
  convergence: Mapping[int, Law],
  ks: tuple[int, ...],
  confidence: float,
) -> list[Advice]:
  """Advice for each k, by L(n, T) where there is one.

  Which k is best is no matter of loss: it falls with k, and so does sparsity.

  Args:
    flops: dense-equivalent budget.
    d_model: width of the activations.
    largest: largest n that was run.
    compute: laws of `forms.COMPUTE` by k.
    surface: of `forms.SURFACE`, of runs to convergence; None if there is none.
    convergence: laws of tokens to convergence by k.
    ks: the ks that were run.
    confidence: of the intervals.
  """
  rows = []
  for k in ks:
    if k in compute:
      rows.append(
        by_compute(compute[k], k, flops, d_model, largest, confidence)
      )
    elif surface is not None and k in convergence:
      rows.append(
        by_convergence(
          surface, convergence[k], k, flops, d_model, largest, confidence
        )
      )
    else:
      rows.append(
        Advice(
          k,
          basis='needs cells at 3 values of n and of tokens, or cells that ran '
          'to convergence',
        )
      )
  return rows
