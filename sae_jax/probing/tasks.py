"""Binary text tasks for probing, from each of `sources`.

Their files repeat prompts to balance the classes, and in several of
them the length of a prompt tells its label. So prompts are made unique first,
and the two classes are then drawn in pairs of like length: neither a repeated
prompt on both sides of a split nor counting characters can score.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import difflib
import re
import zlib

from absl import logging
import numpy as np

from sae_jax import errors
from sae_jax.probing import sources
from sae_jax.text.flaws import FLAWED_TASKS

# A person's sex from the name, the verdict of a review, a place's country, a
# headline's topic. In these short texts the last token alone does not decide
# the label; few share their wording, and hardly any has a single token.
DEMO_TASKS = (
  '5_hist_fig_ismale',
  '113_movie_sent',
  '125_world_country_Italy',
  '23_headline_ischina',
)

_LENGTH_BANDS = 16
# Of all tasks, those with fewer prompts than are asked for have so many.
_LEAST_PROMPTS = 100


class _TooFewError(errors.UserError):
  """A task has too few prompts."""


@dataclasses.dataclass(frozen=True)
class Task:
  """A binary task: unique prompts, equally many of both classes.

  Attributes:
    name: its name in its source.
    prompts: P texts without white space at either end.
    labels_P: int32, 0 or 1.
    classes: the source's names of label 0 and label 1, in sorted order.
    source: one of `sources.NAMES`.
  """

  name: str
  prompts: tuple[str, ...]
  labels_P: np.ndarray
  classes: tuple[str, str] = ('0', '1')
  source: str = sources.NAMES[0]


def load_tasks(
  names: Sequence[str] | None = None,
  n_tasks: int = len(DEMO_TASKS),
  n_prompts: int = 400,
  max_chars: int = 100,
  seed: int = 0,
) -> list[Task]:
  """Loads tasks with `n_prompts` short prompts each.

  A prompt counts once whatever its case and spacing, and not at all where the
  source gives it both labels. Prompts over `max_chars` are dropped, and the
  rest is drawn in pairs, one of each class, from the same band of lengths. A
  task's prompts depend on its name and the seed, not on the other tasks loaded.

  Args:
    names: tasks to load, flawed ones too; None takes `DEMO_TASKS` first, then
      in the order of the sources the others that have no flaw, skipping those
      that are not binary or too small.
    n_tasks: number of tasks to take when `names` is None; 0 takes all, and of
      those with fewer prompts what they have, if that is 100 or more.
    n_prompts: prompts of each task, even.
    max_chars: the longest prompt, in characters.
    seed: seed of the choice of prompts.

  Raises:
    UserError: if a source is missing, a name is unknown or not a binary task,
      or there are too few prompts or tasks.
  """
  if n_prompts < 4 or n_prompts % 2:
    raise errors.UserError(
      f'{n_prompts} prompts of a task must be an even number from 4 up: '
      f'use {max(4, n_prompts + n_prompts % 2)}'
    )
  drawing = (n_prompts, max_chars, seed)
  if names is not None:
    return [
      _load(_source_of(name), name, n_prompts, *drawing) for name in names
    ]
  least = n_prompts if n_tasks else min(n_prompts, _LEAST_PROMPTS)
  tasks, reasons = [], []
  for source, name in _without_flaw():
    if n_tasks and len(tasks) == n_tasks:
      break
    try:
      tasks.append(_load(source, name, least, *drawing))
    except errors.UserError as error:
      reasons.append(error)
      logging.info('Skipped a probe task: %s', error)
  if len(tasks) < max(n_tasks, 1):
    raise errors.UserError(
      f'only {len(tasks)} of {n_tasks or len(reasons)} probe tasks have '
      f'{least} prompts of at most {max_chars} characters: '
      'lower n_prompts or n_tasks, or raise max_chars'
    )
  n_small = sum(isinstance(reason, _TooFewError) for reason in reasons)
  if not n_tasks and n_small:
    logging.warning(
      '%d binary tasks have fewer than %d prompts of at most %d characters and '
      'are left out: raise task_chars, and task_tokens with it',
      n_small,
      least,
      max_chars,
    )
  return tasks


def split(
  task: Task, seed: int = 0, test_fraction: float = 0.4
) -> tuple[np.ndarray, np.ndarray]:
  """Splits a task's prompts, keeping the share of each class.

  Args:
    task: the task.
    seed: seed of the choice of held-out prompts.
    test_fraction: share of each class that is held out, in (0, 1).

  Returns:
    train_idx, test_idx: disjoint sorted int64 indices that cover the task.

  Raises:
    UserError: if a class would have no prompt on one of the sides.
  """
  rng = _generator(seed, f'{task.name} split')
  train, test = [], []
  for label in (0, 1):
    members = rng.permutation(np.flatnonzero(task.labels_P == label))
    n_test = round(test_fraction * len(members))
    if not 0 < n_test < len(members):
      raise errors.UserError(
        f'{task.name}: test_fraction {test_fraction} of the {len(members)} '
        f'prompts with label {label} leaves a side of the split empty: '
        'use more prompts or another fraction'
      )
    test.append(members[:n_test])
    train.append(members[n_test:])
  return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def _generator(seed: int, purpose: str) -> np.random.Generator:
  return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def _without_flaw() -> Iterator[tuple[str, str]]:
  """Sources and names of tasks in the order in which they are taken."""
  for source in sources.NAMES:
    known = sources.of(source).names()
    taken = [name for name in DEMO_TASKS if source == sources.NAMES[0]]
    taken += [name for name in known if name not in {*taken, *FLAWED_TASKS}]
    for name in taken:
      if name in known:
        yield source, name


def _source_of(name: str) -> str:
  """The source that has a task."""
  known = []
  for source in sources.NAMES:
    names = sources.of(source).names()
    if name in names:
      return source
    known += names
  # Names begin with a number that nobody remembers: compare without it too.
  bare = {re.sub(r'^\d+_', '', k): k for k in known}
  close = difflib.get_close_matches(name, known, cutoff=0.5)
  close += [bare[b] for b in difflib.get_close_matches(name, bare, cutoff=0.5)]
  close = list(dict.fromkeys(close))[:4] or known[:4]
  raise errors.UserError(
    f'probe task {name!r} is not known: did you mean {", ".join(close)}?'
  )


def _load(
  source: str, name: str, least: int, n_prompts: int, max_chars: int, seed: int
) -> Task:
  """A task with `n_prompts` prompts, or what there are from `least` up."""
  classes, labels = sources.of(source).read(name)
  if len(classes) != 2:
    raise errors.UserError(
      f'{name} is not a binary task ({len(classes)} or more classes): '
      'use one with two'
    )
  short = {p: label for p, label in labels.items() if len(p) <= max_chars}
  rng = _generator(seed, name)
  pairs = _pairs(short, rng)
  if 2 * len(pairs) < least:
    raise _TooFewError(
      f'{name} has {2 * len(pairs)} prompts of at most {max_chars} '
      f'characters in two classes of like length, n_prompts is {n_prompts}: '
      'lower it or raise max_chars'
    )
  chosen = [p for pair in pairs[: n_prompts // 2] for p in pair]
  prompts = tuple(chosen[i] for i in rng.permutation(len(chosen)))
  labels_P = np.array([short[p] for p in prompts], np.int32)
  return Task(name, prompts, labels_P, classes, source)


def _pairs(
  labels: dict[str, int], rng: np.random.Generator
) -> list[tuple[str, str]]:
  """Pairs of a prompt of each class from one band of lengths, shuffled."""
  if not labels:
    return []
  prompts = list(labels)
  lengths = np.array([len(p) for p in prompts])
  inner = np.linspace(0, 1, _LENGTH_BANDS + 1)[1:-1]
  bands = np.searchsorted(np.quantile(lengths, inner), lengths, side='right')
  labels_P = np.array([labels[p] for p in prompts])
  pairs = []
  for band in np.unique(bands):
    zeros, ones = (
      rng.permutation(np.flatnonzero((bands == band) & (labels_P == label)))
      for label in (0, 1)
    )
    pairs += [(prompts[i], prompts[j]) for i, j in zip(zeros, ones)]
  return [pairs[i] for i in rng.permutation(len(pairs))]
