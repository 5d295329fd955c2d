"""Reads what was saved and compares it with its checksums."""

from collections.abc import Iterator
import dataclasses
import os

from etils import epath

from sae_jax import errors
from sae_jax.checkpoint import format
from sae_jax.storage import saved_arrays


@dataclasses.dataclass(frozen=True)
class Report:
  """What reading an array of a checkpoint has shown.

  Attributes:
    place: the checkpoint and the array in it.
    text: what the array is, or why it is damaged.
    sound: whether it can be read, and is what was saved as far as it can tell.
  """

  place: str
  text: str
  sound: bool


def verify(url: str) -> Iterator[Report]:
  """Reads every array of a run's checkpoints, and keeps none.

  Args:
    url: the run's workdir, a local path or URL; or the folder of a sweep.

  Yields:
    A report on each array, and on each checkpoint whose JSON is damaged.

  Raises:
    UserError: if there is no checkpoint.
  """
  workdirs = [url] if format.folder(url).exists() else _runs(url)
  for workdir in workdirs:
    place = format.folder(workdir)
    for step in format.steps(place):
      yield from _verify_step(place, step)


def _runs(url: str) -> list[str]:
  """The workdirs of a sweep's runs."""
  place = epath.Path(url)
  inside = sorted(place.iterdir()) if place.is_dir() else []
  workdirs = [os.fspath(p) for p in inside if format.folder(p).exists()]
  if not workdirs:
    raise errors.UserError(
      f'no checkpoints under {url}: give the workdir of sae-train'
    )
  return workdirs


def _verify_step(place: epath.Path, step: int) -> Iterator[Report]:
  path, remedy = os.fspath(place / str(step)), format.remedy_of(place, step)
  try:
    _, declared = format.read_record(place, step)
  except errors.UserError as error:
    yield Report(path, str(error), False)
    return
  for part in format.PARTS:
    yield from _verify_part(path, part, declared, remedy)


def _verify_part(path, part, declared, remedy) -> Iterator[Report]:
  folder = os.path.join(path, part)
  try:
    saved_arrays.check_json(folder, remedy)
    names = set(saved_arrays.names(folder))
  except ValueError as error:
    yield Report(folder, f'damaged: {errors.reason(error)}', False)
    return
  if declared is not None:
    names |= {n.partition('/')[2] for n in declared if n.startswith(f'{part}/')}
  for name in sorted(names):
    place = os.path.join(folder, name)
    try:
      text = _read(folder, name, declared and declared.get(f'{part}/{name}'))
      yield Report(place, text, True)
    except ValueError as error:
      yield Report(place, f'damaged: {errors.reason(error)}', False)


def _read(folder: str, name: str, declared: list | None) -> str:
  """Reads an array; says what it is.

  Raises:
    ValueError: if it cannot be read or is not what was saved.
  """
  array = saved_arrays.open_array(folder, name)
  described = [array.dtype.name, list(array.shape)]
  if declared not in (None, described):
    raise ValueError(f'it is {described}, and was saved as {declared}')
  n_bytes = saved_arrays.read_through(array)
  digests = saved_arrays.has_digests(array)
  if declared and not digests:
    raise ValueError('its description lacks the checksums of its chunks')
  text = f'{array.dtype.name} {list(array.shape)}, {n_bytes:,} bytes'
  if digests:
    return f'{text}, as saved'
  return f'{text}, can be read; it carries no digest, an older version saved it'


def look(place: epath.Path, step: int) -> None:
  """Opens each array of a checkpoint that was just saved, reads a chunk of it.

  Args:
    place: the folder of the checkpoints.
    step: of the checkpoint.

  Raises:
    UserError: if it could not be read again.
  """
  path = place / str(step)
  name = ''
  try:
    _, declared = format.read_record(place, step)
    for name in declared:
      part, _, array_name = name.partition('/')
      array = saved_arrays.open_array(os.fspath(path / part), array_name)
      saved_arrays.read_through(array, chunks=1)
      if not saved_arrays.has_digests(array):
        raise ValueError('its chunks have no checksums')
  except ValueError as error:
    raise errors.UserError(
      f'checkpoint {path} was saved, but could not be read again '
      f'({name}: {errors.reason(error)}): check that the disk or bucket keeps '
      'what is written, and use another workdir'
    ) from error
