"""Folders that stages write: whose they are, and what they are made from.

Every stage writes a mark of its own into its folder before anything else:
harvesting plan.json, training config.json, probing and the page `MADE_FROM`;
training in a bucket, where no folder can be claimed, writes that too.
"""

from collections.abc import Collection, Iterator, Mapping
import contextlib
import json
from typing import Any

from etils import epath

from sae_jax import config, errors
from sae_jax.storage import claim, files, records

MADE_FROM = 'made_from.json'
_SHOWN = 3
# TensorStore writes a file under this name first; a killed process leaves it.
_UNFINISHED = '.__lock'


def check_own(
  folder: epath.PathLike,
  stage: str,
  marks: Mapping[str, Collection[str]] | None = None,
) -> None:
  """Refuses a folder that holds files and is not of a stage.

  Hidden files do not count: no stage writes what is kept under such a name.

  Args:
    folder: local path or URL; it need not exist.
    stage: the stage's command, such as 'sae-train'.
    marks: names of which one at least is in each folder of the stage, unless
      `MADE_FROM` is; for a JSON file also keys that it has, so that another's
      of the name is no mark.

  Raises:
    UserError: if the folder is somebody else's.
  """
  folder = epath.Path(folder)
  if not folder.exists():
    return
  if not folder.is_dir():
    raise errors.UserError(f'{folder} is a file: give a folder')
  names = sorted(path.name for path in folder.iterdir())
  names = [
    name
    for name in names
    if not (name.startswith('.') or name.endswith(_UNFINISHED))
  ]
  # Looked for one by one, as a mark may be written while names are listed.
  if (
    names
    and _record_of(folder / MADE_FROM).get('stage') != stage
    and not any(_is_mark(folder / n, keys) for n, keys in (marks or {}).items())
  ):
    shown = ', '.join(names[:_SHOWN]) + (', ...' if names[_SHOWN:] else '')
    raise errors.UserError(
      f'{folder} holds {shown} and is not of {stage}, which would replace '
      'files there: use a new or an empty folder'
    )


def _is_mark(path: epath.Path, keys: Collection[str]) -> bool:
  if not keys:
    return path.exists()
  return set(keys) <= _record_of(path).keys()


def _record_of(path: epath.Path) -> dict[str, Any]:
  """What a JSON file holds; nothing if it is not there or damaged."""
  try:
    return records.read(path)
  except errors.UserError:
    return {}


@contextlib.contextmanager
def hold(
  folder: str, stage: str, made_from: Mapping[str, Any]
) -> Iterator[None]:
  """Keeps a folder for one stage's results from some inputs.

  While it is open no other process of this machine has the folder. Processes
  on one bucket can't be kept out, but of two with other inputs only one can
  `sign`, and two with equal inputs write equal results.

  Args:
    folder: local path or URL; a local one is made.
    stage: the stage's command, such as 'sae-probe'.
    made_from: everything that the results depend on, as it reads back from
      JSON. What may differ between results that replace each other, such as
      versions, is left out.

  Raises:
    UserError: if the folder is in use, somebody else's, or holds results of
      other inputs.
  """
  with claim.claim(folder):
    check_own(folder, stage)
    if (epath.Path(folder) / MADE_FROM).exists():
      _check_same(folder, _record(stage, made_from))
    yield


def sign(folder: str, stage: str, made_from: Mapping[str, Any]) -> None:
  """Writes what results are made from, before the first file of them.

  Args:
    folder: see `hold`, which must be open.
    stage: see `hold`.
    made_from: see `hold`.

  Raises:
    UserError: if another process has begun results of other inputs there.
    OSError: if it cannot be written.
  """
  record = _record(stage, made_from)
  try:
    same = files.create(files.folder(folder), MADE_FROM, record)
  except ValueError as error:
    raise OSError(
      f'cannot write {folder}/{MADE_FROM}: {errors.reason(error)}'
    ) from error
  if not same:
    _check_same(folder, record)


def _record(stage: str, made_from: Mapping[str, Any]) -> bytes:
  record = {'stage': stage, 'made_from': made_from}
  return config.to_json(record).encode()


def _check_same(folder: str, record: bytes) -> None:
  """Raises UserError if the folder's record is another."""
  own = dict(_leaves(json.loads(record)))
  there = dict(_leaves(records.read(epath.Path(folder) / MADE_FROM)))
  if own == there:
    return
  changes = [
    f'{name.partition(".")[2] or name}: {there.get(name)!r} -> '
    f'{own.get(name)!r}'
    for name in sorted(own.keys() | there.keys())
    if own.get(name) != there.get(name)
  ]
  raise errors.UserError(
    f'{folder} holds results of other inputs ({"; ".join(changes)}): use '
    'another folder, or delete this one to make them anew'
  )


def _leaves(value: Any, name: str = '') -> Iterator[tuple[str, Any]]:
  """The values of nested mappings by dotted name."""
  if isinstance(value, dict):
    for key, inner in value.items():
      yield from _leaves(inner, f'{name}.{key}' if name else key)
  else:
    yield name, value
