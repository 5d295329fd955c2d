"""What fits say, in sentences: for a terminal, fits.json and the report."""

from sae_jax.scaling.advise import Advice
from sae_jax.scaling.findings import number
from sae_jax.scaling.further import Further
from sae_jax.scaling.holdout import Holdout


def of_further(plan: Further) -> str:
  """Which cells to run, in one sentence."""
  cells = '; '.join(
    f'n {n:,}, k {k}, {seeds} seed{"s" if seeds > 1 else ""}'
    for n, k, seeds in plan.runs
  )
  verdict = (
    'enough'
    if plan.is_enough
    else f'not enough, {number(plan.wanted)} is needed'
  )
  return (
    f'with {cells} ({plan.flops:.2g} FLOPs, dense-equivalent) its interval is '
    f'expected to be {number(plan.width)} wide if it is '
    f'{number(plan.assumed)}: {verdict}'
  )


def of_holdout(left: Holdout) -> str:
  """What a prediction of rows that were left out came to."""
  start = f'largest {left.variable}, {left.value:,.0f}, left out'
  if left.refusal:
    return f'{start}: not predicted, {left.refusal}'
  runs = f'{left.rows} run{"s" if left.rows > 1 else ""}'
  return (
    f'{start}: {runs} predicted with an error of {left.error:.1%} (bias '
    f'{left.bias:+.1%}), {left.covered:.0%} within their intervals'
  )


def of_advice(row: Advice) -> str:
  """Advice at one k in a line."""
  if not row.n_latents:
    return f'k {row.k}: no advice, {row.basis}'
  beyond = (
    f', {row.beyond:.1f} times the largest n that was run'
    if row.beyond > 1
    else ''
  )
  return (
    f'k {row.k}: n {row.n_latents:,} on {row.tokens:,} tokens, loss '
    f'{number(row.loss)} ({number(row.low)} to {number(row.high)}) by '
    f'{row.basis}{beyond}'
  )
