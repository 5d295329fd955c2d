"""The tasks in the installed package sae-probes, read without importing it."""

import csv
import re

from etils import epath
import zstandard

from sae_jax import errors
from sae_jax.storage import packages

ORIGIN = (
  'sae-probes 0.4.2: the 113 binary tasks of Kantamneni et al. 2025, arXiv '
  '2502.16681'
)
LICENCE = (
  'MIT, of the package; the texts have those of the data sets that it names'
)

_REQUIREMENT = 'sae-probes==0.4.2'
_SUFFIX = '.csv.zst'


def names() -> list[str]:
  """See `sources.Source`: in the order of their leading numbers."""
  unsorted = [
    path.name.removesuffix(_SUFFIX) for path in _folder().glob(f'*{_SUFFIX}')
  ]

  def order(name):
    number = re.match(r'\d+', name)
    return (int(number[0]) if number else len(unsorted), name)

  return sorted(unsorted, key=order)


def read(name: str) -> tuple[tuple[str, ...], dict[str, int]]:
  """See `sources.Source`. Reading ends at a third class."""
  # White space goes from both ends: in some files only one of the classes has
  # it, so the last token would tell the label.
  first, targets = {}, {}
  classes = set()
  with (
    (_folder() / f'{name}{_SUFFIX}').open('rb') as raw,
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


def _folder() -> epath.Path:
  package = packages.folder('sae_probes', _REQUIREMENT, 'a probe task')
  folder = epath.Path(package) / 'data' / 'cleaned_data'
  if not folder.is_dir():
    raise errors.UserError(
      f'{package} has no probe tasks: pip install --no-deps {_REQUIREMENT}'
    )
  return folder
