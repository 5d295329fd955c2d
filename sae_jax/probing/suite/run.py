"""Runs evaluations, one after the other, and keeps each that is finished."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import time
from typing import Any

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np

from sae_jax import config as config_lib
from sae_jax.probing.suite import evaluations, figures, saved
from sae_jax.probing.suite.context import CannotMeasure, Context
from sae_jax.probing.suite.outcome import Outcome
from sae_jax.probing.suite.saved import Result
from sae_jax.storage import joined


def run(
  names: Sequence[str],
  context: Context,
  workdir: str,
  made_from: Mapping[str, Any],
) -> dict[str, Result]:
  """The results of evaluations, of which those that are there are kept.

  Beside those that are named it has all others that the workdir has, of either
  size. All processes call it; the first one writes.

  Args:
    names: of the evaluations.
    context: what they measure.
    workdir: of sae-probe.
    made_from: all that their results depend on beside the context's size and
      seed, as it reads back from JSON.
  """
  results = {}
  for name in names:
    inputs = _inputs(name, context, context.size, made_from)
    result = saved.read(workdir, name, inputs)
    if _all_have(result):
      logging.info('%s is measured already: kept', name)
    else:
      result = _measured(name, context)
      write = functools.partial(saved.write, workdir, name, inputs, result)
      joined.by_first(workdir, write)
    results[name] = result
  # What was asked for before.
  for name in sorted(set(evaluations.NAMES) - set(names)):
    for size in (evaluations.QUICK, evaluations.ALL):
      result = saved.read(
        workdir, name, _inputs(name, context, size, made_from)
      )
      if _all_have(result):
        results[name] = result
  return {name: results[name] for name in sorted(results)}


def _inputs(
  name: str, context: Context, size: str, made_from
) -> dict[str, Any]:
  """All that a result depends on."""
  return {
    'options': evaluations.options(name, context.loss_curve, context.wordnet),
    'inputs': made_from,
    'size': dataclasses.asdict(evaluations.of(name).SIZES[size]),
    'seed': context.seed,
    'scored': list(context.scored),
  }


def _all_have(result: Result | None) -> bool:
  """Whether every process has read a result."""
  has = np.array(result is not None)
  if jax.process_count() > 1:
    has = multihost_utils.process_allgather(has)
  return bool(has.all())


def _measured(name: str, context: Context) -> Result:
  evaluation = evaluations.of(name)
  size = dataclasses.asdict(evaluation.SIZES[context.size])
  start = time.monotonic()
  record = {
    'title': evaluation.TITLE,
    'about': evaluation.ABOUT,
    'unit': evaluation.UNIT,
    'size_name': context.size,
    'options': evaluations.options(name, context.loss_curve, context.wordnet),
    'size': size,
    'draws': context.draws,
  }
  try:
    _check_one_site(evaluation, context)
    outcome = evaluation.measure(context)
  except CannotMeasure as error:
    logging.warning('%s cannot be measured: %s', name, error)
    record['cannot'] = str(error)
    return Result(config_lib.through_json(record), {}, {})
  record |= _figures(evaluation, outcome)
  record['remarks'] = list(outcome.remarks)
  record['tables'] = outcome.tables
  logging.info('%s took %.0f s', name, time.monotonic() - start)
  return Result(
    config_lib.through_json(record), outcome.samples, outcome.columns
  )


def _check_one_site(
  evaluation: evaluations.Evaluation, context: Context
) -> None:
  """Raises CannotMeasure for what is not defined of a transcoder."""
  if not getattr(evaluation, 'ONE_SITE', False):
    return
  written = context.itself.shape.config.target_site
  if written:
    raise CannotMeasure(
      f'it is of latents that act where they are encoded, at {context.site}, '
      f'and this is a transcoder, whose latents act at {written}'
    )


def _figures(
  evaluation: evaluations.Evaluation, outcome: Outcome
) -> dict[str, Any]:
  """Figures and curves by name, with what they mean."""
  out = {'figures': {}, 'curves': {}}
  for name, statistic in (evaluation.STATISTICS | outcome.statistics).items():
    entry = {
      'title': statistic.title,
      'definition': statistic.definition,
      'unit': statistic.unit,
      'better': statistic.better,
      'orders': statistic.orders,
      'of': {
        who: dataclasses.asdict(figures.figure(statistic, sample))
        for who, sample in outcome.samples.items()
      },
    }
    if statistic.points:
      entry['points'] = statistic.points
      entry['x'] = outcome.points[statistic.points].tolist()
      out['curves'][name] = entry
    else:
      out['figures'][name] = entry
  return out
