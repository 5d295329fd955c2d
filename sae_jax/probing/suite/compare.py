"""Differences of autoencoders in finished evaluations, with intervals."""

from collections.abc import Sequence
import itertools
from typing import Any

from etils import epath

from sae_jax import errors
from sae_jax.probing.suite import evaluations, figures, saved

# Units that are the same for all autoencoders of a store.
_PAIRED = ('documents', 'draws', 'tasks', 'concepts', 'letters')


def compare(workdirs: Sequence[str]) -> list[dict[str, Any]]:
  """The difference of each pair of autoencoders in each figure.

  Args:
    workdirs: of sae-probe with a suite, two or more; local paths or URLs.

  Returns:
    A row for each figure and pair: evaluation, figure, one, other, value, low,
    high, units, and whether they are told apart: the interval excludes 0.

  Raises:
    UserError: if there are fewer than two, or they have no evaluation in
      common that was made of the same test text.
  """
  if len(workdirs) < 2:
    raise errors.UserError(
      f'compare needs two workdirs of sae-probe or more, {len(workdirs)} given'
    )
  rows = []
  for name in evaluations.NAMES:
    results = {
      workdir: result
      for workdir in workdirs
      if (result := saved.read(workdir, name, None)) and result.samples
    }
    for one, other in itertools.combinations(results, 2):
      rows += _pair(name, (one, results[one]), (other, results[other]))
  if not rows:
    raise errors.UserError(
      f'{", ".join(workdirs)} have no evaluation in common: run sae-probe with '
      'the same --suite on each'
    )
  return rows


def _pair(name: str, one, other) -> list[dict[str, Any]]:
  evaluation = evaluations.of(name)
  (one_url, one_result), (other_url, other_result) = one, other
  samples = [
    next(iter(result.samples.values())) for result in (one_result, other_result)
  ]
  rows = []
  for key, statistic in evaluation.STATISTICS.items():
    if statistic.points:
      continue
    try:
      gap = figures.difference(
        statistic, *samples, paired=evaluation.UNIT in _PAIRED
      )
    except ValueError as error:
      raise errors.UserError(
        f'{name} of {one_url} and {other_url} cannot be compared: {error}: '
        'probe both on the same store, with the same --suite and --seed'
      ) from error
    if gap.value is None:
      continue
    told = None
    if gap.low is not None:
      told = not gap.low <= 0 <= gap.high
    rows.append(
      {
        'evaluation': name,
        'figure': key,
        'title': statistic.title,
        'better': statistic.better,
        'one': str(epath.Path(one_url)),
        'other': str(epath.Path(other_url)),
        'value': gap.value,
        'low': gap.low,
        'high': gap.high,
        'units': gap.units,
        'told_apart': told,
      }
    )
  return rows


def lines(rows: Sequence[dict[str, Any]]) -> list[str]:
  """The rows as lines of text."""
  out, last = [], None
  for row in rows:
    pair = f'{row["one"]} less {row["other"]}'
    if pair != last:
      out.append(pair)
      last = pair
    interval = (
      f'[{row["low"]:+.4g}, {row["high"]:+.4g}]'
      if row['low'] is not None
      else '(no interval)'
    )
    verdict = '' if row['told_apart'] else '  cannot be told apart'
    out.append(
      f'  {row["evaluation"]}: {row["title"]} {row["value"]:+.4g} {interval}'
      f'{verdict}'
    )
  return out
