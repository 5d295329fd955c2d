"""Binary text tasks for probing, from the installed package sae_probes.

The package's files repeat prompts to balance the classes, and in several of
them the length of a prompt tells its label. So prompts are made unique first,
and the two classes are then drawn in pairs of like length: neither a repeated
prompt on both sides of a split nor counting characters can score.
"""

from collections.abc import Sequence
import csv
import dataclasses
import difflib
import re
import zlib

from absl import logging
from etils import epath
import numpy as np
import zstandard

from sae_jax import errors
from sae_jax.storage import packages
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

_REQUIREMENT = 'sae-probes==0.4.2'
_SUFFIX = '.csv.zst'
_LENGTH_BANDS = 16


@dataclasses.dataclass(frozen=True)
class Task:
  """A binary task: unique prompts, equally many of both classes.

  Attributes:
    name: the file's name in the package, without its ending.
    prompts: P texts without white space at either end.
    labels_P: int32, 0 or 1.
    classes: the file's names of label 0 and label 1, in sorted order.
  """

  name: str
  prompts: tuple[str, ...]
  labels_P: np.ndarray
  classes: tuple[str, str] = ('0', '1')


def load_tasks(
  names: Sequence[str] | None = None,
  n_tasks: int = len(DEMO_TASKS),
  n_prompts: int = 400,
  max_chars: int = 100,
  seed: int = 0,
) -> list[Task]:
  """Loads tasks with `n_prompts` short prompts each.

  A prompt counts once whatever its case and spacing, and not at all where the
  file gives it both labels. Prompts over `max_chars` are dropped, and the rest
  is drawn in pairs, one of each class, from the same band of lengths. A task's
  prompts depend on its name and the seed, not on the other tasks loaded.

  Args:
    names: tasks to load, flawed ones too; None takes `DEMO_TASKS` first, then
      in the package's order the others that have no flaw, skipping those that
      are not binary or too small.
    n_tasks: number of tasks to take when `names` is None; 0 takes all.
    n_prompts: prompts of each task, even.
    max_chars: the longest prompt, in characters.
    seed: seed of the choice of prompts.

  Raises:
    UserError: if the package is missing, a name is unknown or not a binary
      task, or there are too few prompts or tasks.
  """
  if n_prompts < 4 or n_prompts % 2:
    raise errors.UserError(
      f'{n_prompts} prompts of a task must be an even number from 4 up: '
      f'use {max(4, n_prompts + n_prompts % 2)}'
    )
  folder = _folder()
  known = _names(folder)
  if names is not None:
    for name in names:
      _check_known(name, known)
    return [_load(folder, name, n_prompts, max_chars, seed) for name in names]
  others = set(known) - set(DEMO_TASKS) - set(FLAWED_TASKS)
  tasks = []
  for name in [*DEMO_TASKS, *(name for name in known if name in others)]:
    if n_tasks and len(tasks) == n_tasks:
      break
    try:
      _check_known(name, known)
      tasks.append(_load(folder, name, n_prompts, max_chars, seed))
    except errors.UserError as error:
      logging.info('Skipped a probe task: %s', error)
  if len(tasks) < max(n_tasks, 1):
    raise errors.UserError(
      f'only {len(tasks)} of {n_tasks or len(known)} probe tasks have '
      f'{n_prompts} prompts of at most {max_chars} characters: '
      'lower n_prompts or n_tasks, or raise max_chars'
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


def _folder() -> epath.Path:
  package = packages.folder('sae_probes', _REQUIREMENT, 'a probe task')
  folder = epath.Path(package) / 'data' / 'cleaned_data'
  if not folder.is_dir():
    raise errors.UserError(
      f'{package} has no probe tasks: pip install --no-deps {_REQUIREMENT}'
    )
  return folder


def _names(folder: epath.Path) -> list[str]:
  """Names of all files in the order of their leading numbers."""
  names = [
    path.name.removesuffix(_SUFFIX) for path in folder.glob(f'*{_SUFFIX}')
  ]

  def order(name):
    number = re.match(r'\d+', name)
    return (int(number[0]) if number else len(names), name)

  return sorted(names, key=order)


def _check_known(name: str, known: list[str]) -> None:
  if name in known:
    return
  # Names begin with a number that nobody remembers: compare without it too.
  bare = {re.sub(r'^\d+_', '', k): k for k in known}
  close = difflib.get_close_matches(name, known, cutoff=0.5)
  close += [bare[b] for b in difflib.get_close_matches(name, bare, cutoff=0.5)]
  close = list(dict.fromkeys(close))[:4] or known[:4]
  raise errors.UserError(
    f'probe task {name!r} is not known: did you mean {", ".join(close)}?'
  )


def _load(
  folder: epath.Path, name: str, n_prompts: int, max_chars: int, seed: int
) -> Task:
  classes, labels = _read(folder / f'{name}{_SUFFIX}')
  if len(classes) != 2:
    raise errors.UserError(
      f'{name} is not a binary task ({len(classes)} or more classes): '
      'use one with two'
    )
  short = {p: label for p, label in labels.items() if len(p) <= max_chars}
  rng = _generator(seed, name)
  pairs = _pairs(short, rng)
  if 2 * len(pairs) < n_prompts:
    raise errors.UserError(
      f'{name} has {2 * len(pairs)} prompts of at most {max_chars} characters '
      f'in two classes of like length, n_prompts is {n_prompts}: '
      'lower it or raise max_chars'
    )
  chosen = [p for pair in pairs[: n_prompts // 2] for p in pair]
  prompts = tuple(chosen[i] for i in rng.permutation(n_prompts))
  labels_P = np.array([short[p] for p in prompts], np.int32)
  return Task(name, prompts, labels_P, classes)


def _read(path: epath.Path) -> tuple[tuple[str, ...], dict[str, int]]:
  """The classes in sorted order and the label of each unique prompt.

  Reading ends at a third class: the file is then not a binary task.
  """
  # White space goes from both ends: in some files only one of the classes has
  # it, so the last token would tell the label.
  first, targets = {}, {}
  classes = set()
  with (
    path.open('rb') as raw,
    zstandard.open(raw, 'rt', encoding='utf-8', newline='') as text,
  ):
    for row in csv.DictReader(text):
      prompt, target = row['prompt'].strip(), row['target']
      classes.add(target)
      if len(classes) > 2:
        return tuple(sorted(classes)), {}
      key = ' '.join(prompt.casefold().split())
      if key:
        first.setdefault(key, prompt)
        targets.setdefault(key, set()).add(target)
  ordered = tuple(sorted(classes))
  labels = {
    first[key]: ordered.index(next(iter(seen)))
    for key, seen in targets.items()
    if len(seen) == 1
  }
  return ordered, labels


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
