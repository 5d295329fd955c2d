"""When a run that goes on until its loss falls no more has converged.

The rule is fixed before any run: the loss on the validation rows is measured at
steps a factor of 2^(1/2) apart, and a run has converged at the first where it
is less than a given share below the loss at the step before.
"""

import dataclasses
import math

from etils import epath

from sae_jax import errors
from sae_jax.storage import records
from sae_jax.training.config import TrainConfig

LOSS = 'validation_fvu'
_LOG = 'metrics.jsonl'
# Looks at a run: the first is after a 32nd of the most steps or more.
_LOOKS = 11


def looks(config: TrainConfig) -> list[int]:
  """The steps after which a run is looked at, the last of which is the most.

  None is within its warm-up, which is a rate that converges to nothing.
  """
  most, warmup = config.steps, config.optimizer.warmup_steps
  steps = {math.ceil(most / 2 ** (nth / 2)) for nth in range(_LOOKS)}
  return sorted(step for step in steps if step >= warmup)


def check(config: TrainConfig) -> None:
  """Raises UserError if a run cannot go on until it has converged.

  Args:
    config: the run, resolved.
  """
  if config.optimizer.decay_steps:
    raise errors.UserError(
      'the learning rate of a run falls over its last '
      f'{config.optimizer.decay_steps} steps, so that it must know its end: '
      'with --converge use --decay_steps=0'
    )


def part(config: TrainConfig, share: float, nth: int) -> TrainConfig:
  """The run up to its nth look; the whole run if it has its steps to do.

  Args:
    config: the run, with the most steps that it may take.
    share: of its loss, by which that falls at least until it has converged; 0
      if it ends after its steps.
    nth: from 0.
  """
  if not share:
    return config
  return dataclasses.replace(config, steps=looks(config)[nth])


def ends(config: TrainConfig, share: float, workdir: str, nth: int) -> bool:
  """Whether a run that has come to its nth look goes no further.

  Args:
    config: see `part`.
    share: see `part`.
    workdir: the run's, whose log is read.
    nth: from 0.

  Raises:
    UserError: if the log is damaged.
  """
  if not share:
    return True
  steps = looks(config)[: nth + 1]
  if steps[-1] == config.steps:
    return True
  if len(steps) < 2:
    return False
  data = (epath.Path(workdir) / _LOG).read_bytes()
  rows, _ = records.parse_lines(data)
  losses = {row['step']: row[LOSS] for row in rows if LOSS in row}
  if not losses.keys() >= set(steps[-2:]):
    raise errors.UserError(
      f'{workdir}/{_LOG} lacks {LOSS} of step {steps[-2]} or {steps[-1]}: '
      'delete the folder, and the run begins anew'
    )
  before, now = (losses[step] for step in steps[-2:])
  return now > (1 - share) * before
