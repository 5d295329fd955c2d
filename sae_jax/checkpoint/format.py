"""What a checkpoint holds; opening, saving and reading one.

A checkpoint is an Orbax bundle of the arrays in `Contents`, a part for each
field, and `Metadata` as JSON. Whoever wants one part reads no other, and no
reader needs what made them: names, shapes and dtypes are in the checkpoint.

It vouches for itself: a checksum lies beside each chunk of an array, and the
JSON holds the shapes and dtypes of all arrays and a digest of itself. All of it
is compared whenever it is read. Checkpoints that are older have neither.
"""

import dataclasses
import hashlib
import json
import math
import os
from typing import Any

from etils import epath
import jax
from orbax.checkpoint import path as paths
from orbax.checkpoint import v1 as ocp

from sae_jax import autoencoder, errors
from sae_jax import config as config_lib
from sae_jax.storage import orbax as orbax_lib
from sae_jax.storage import records, saved_arrays
from sae_jax.storage import url as url_lib

# What a run has counted, scalars but for `silent_N`.
PROGRESS = ('silent_N', 'mse_of_mean', 'step', 'skipped')

# Where Orbax keeps what it is told of a checkpoint.
_RECORD = '_CHECKPOINT_METADATA'


@dataclasses.dataclass(frozen=True)
class Contents:
  """All arrays of a checkpoint.

  Attributes:
    sae: the parameters, in the checkpoint as `autoencoder.to_dict` names them.
    ema: their moving average: `count`, and the undebiased `ema` by name.
    adam: Adam's `count`, and its moments `mu` and `nu` by name.
    progress: the arrays of PROGRESS by name.
  """

  sae: autoencoder.Sae
  ema: Any
  adam: Any
  progress: dict[str, jax.Array]

  def parts(self) -> dict[str, Any]:
    """The parts of the bundle by name."""
    parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return parts | {'sae': autoencoder.to_dict(self.sae)}


PARTS = tuple(field.name for field in dataclasses.fields(Contents))


@dataclasses.dataclass(frozen=True)
class Metadata:
  """What a checkpoint says beside its arrays; JSON has the same names.

  Attributes:
    train_config: the run's TrainConfig, as `dataclasses.asdict` gives it.
    mse_of_mean: the constant that NMSE divides by.
    dataset: the store it was trained on, from `Store.about`.
    metric_definitions: what the metrics mean, in words.
    feed: where the next batch comes from, of batches that keep a cursor.
  """

  train_config: dict[str, Any]
  mse_of_mean: float
  dataset: dict[str, Any]
  metric_definitions: dict[str, str]
  feed: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def sae_config(self) -> autoencoder.SaeConfig:
    """The autoencoder's config."""
    return config_lib.from_dict(autoencoder.SaeConfig, self.train_config['sae'])

  @property
  def ema_decay(self) -> float:
    """Decay of the moving average."""
    return self.train_config['optimizer']['ema_decay']

  @property
  def freeze(self) -> str:
    """The part that was frozen; checkpoints older than the flag have none."""
    return self.train_config['optimizer'].get('freeze', 'none')

  @property
  def sample_rows(self) -> int:
    """Rows at the start of the store that the run was fitted to, at most."""
    return self.train_config['sample_rows']

  @property
  def dataset_version(self) -> int:
    """The store's version; checkpoints older than versions name none."""
    return self.dataset.get('version', 1)

  def check(self) -> None:
    """Raises KeyError, TypeError or UserError where a property would."""
    _ = self.sae_config, math.isnan(self.ema_decay), range(self.sample_rows)
    _ = range(self.dataset_version)


def open_checkpointer(
  workdir: str, keep: int | None = 2, timeout_s: int | None = None
) -> ocp.training.Checkpointer:
  """Opens a run's checkpoints; close it, or use it as a context manager.

  Args:
    workdir: the run's folder or URL.
    keep: how many of the latest are kept. None to read alone: all are kept, and
      nothing is cleaned up after a run that was killed, which may be alive.
    timeout_s: see `storage.orbax.context`.

  Raises:
    UserError: if the JSON of one of them is damaged.
  """
  context = orbax_lib.context(workdir, timeout_s)
  place = folder(workdir)
  for step in steps(place):
    path = place / str(step) / _RECORD
    # Orbax logs what it cannot parse, all of it.
    if path.exists():
      records.read(path, remedy_of(place, step))
  policies = ocp.training.preservation_policies
  try:
    return ocp.training.Checkpointer(
      place,
      context=context,
      preservation_policy=policies.LatestN(keep) if keep else None,
      cleanup_tmp_directories=keep is not None,
    )
  except (TypeError, ValueError, OverflowError):
    # It does this to each of them, and does not say to which it could not.
    names = paths.step.standard_name_format()
    for step in steps(place):
      _ = orbax_lib.explained(
        lambda step=step: names.find_step(place, step).commit_timestamp,
        place / str(step),
        [],
        remedy_of(place, step),
      )
    raise


def steps(place: epath.Path) -> list[int]:
  """The steps that have a folder, whole or not."""
  if not place.exists():
    return []
  return sorted(int(p.name) for p in place.iterdir() if p.name.isdecimal())


def folder(workdir: str) -> epath.Path:
  """Where a run's checkpoints lie."""
  # Orbax writes to no relative path.
  return epath.Path(url_lib.absolute(workdir)) / 'checkpoints'


def save(
  checkpointer: ocp.training.Checkpointer,
  step: int,
  contents: Contents,
  metadata: Metadata,
) -> ocp.AsyncResponse:
  """Begins to save a checkpoint; its `result` waits until it is there."""
  parts = contents.parts()
  values = dataclasses.asdict(metadata) | {'arrays': _described(parts)}
  values = config_lib.through_json(values)
  return checkpointer.save_checkpointables_async(
    step,
    parts,
    force=True,
    custom_metadata=values | {'sha256': _sha256(values)},
  )


def _described(parts: dict[str, Any]) -> dict[str, list[Any]]:
  """Dtype and shape of each array by name, as Orbax names it in a part."""
  return {
    f'{part}/' + jax.tree_util.keystr(path, simple=True, separator='.'): [
      str(jax.numpy.dtype(array.dtype)),
      list(array.shape),
    ]
    for part, tree in parts.items()
    for path, array in jax.tree_util.tree_leaves_with_path(tree)
  }


def _sha256(values: dict[str, Any]) -> str:
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def read_metadata(
  checkpointer: ocp.training.Checkpointer, step: int
) -> Metadata:
  """The metadata of a checkpoint.

  Raises:
    UserError: if it is damaged, or another version of sae_jax wrote it.
  """
  return read_record(checkpointer.directory, step)[0]


def read_record(
  place: epath.Path, step: int
) -> tuple[Metadata, dict[str, list[Any]] | None]:
  """The metadata of a checkpoint, and what its arrays are.

  Args:
    place: the folder of the run's checkpoints, from `folder`.
    step: of the checkpoint.

  Returns:
    The metadata; dtype and shape of each array by name, None if the checkpoint
    is older than digests.

  Raises:
    UserError: see `read_metadata`.
  """
  path = place / str(step) / _RECORD
  remedy = remedy_of(place, step)
  values = records.read(path, remedy).get('custom_metadata')
  values = values if isinstance(values, dict) else {}
  absent = {'train_config', 'mse_of_mean', 'dataset'} - set(values)
  if absent:
    raise errors.UserError(
      f'{path} is damaged (no {", ".join(sorted(absent))}): {remedy}'
    )
  digest, arrays = values.pop('sha256', None), None
  if digest is not None:
    if digest != _sha256(values):
      raise errors.UserError(
        f'{path} is damaged (its digest is another): {remedy}'
      )
    arrays = values.pop('arrays')
  values = {'metric_definitions': {}} | values
  metadata = config_lib.from_dict(Metadata, values, name=str(path))
  try:
    metadata.check()
  except (KeyError, TypeError) as error:
    raise errors.UserError(
      f'{path} is damaged ({type(error).__name__}: {error}): {remedy}'
    ) from error
  return metadata, arrays


def read(
  checkpointer: ocp.training.Checkpointer, step: int, wanted: Contents
) -> Contents:
  """All of a checkpoint.

  Args:
    checkpointer: from `open_checkpointer`.
    step: of the checkpoint.
    wanted: shapes, dtypes and shardings.

  Raises:
    UserError: if a part is missing, damaged or of another shape.
  """
  parts = wanted.parts()
  saved = saved_parts(checkpointer, step, tuple(parts), parts)
  # Once a parameter that an activation has not was saved as None. Orbax asks
  # for the very names that were saved.
  nothing = {name: None for name, a in saved['sae'].items() if a is None}
  parts = _load(checkpointer, step, parts | {'sae': nothing | parts['sae']})
  arrays = {name: a for name, a in parts['sae'].items() if a is not None}
  return Contents(**parts | {'sae': autoencoder.from_dict(arrays)})


def saved_parts(
  checkpointer: ocp.training.Checkpointer,
  step: int,
  names: tuple[str, ...],
  wanted: dict[str, Any] | None = None,
) -> dict[str, Any]:
  """What the arrays of parts are, without reading them.

  Args:
    checkpointer: from `open_checkpointer`.
    step: of the checkpoint.
    names: the parts.
    wanted: shapes and dtypes that they must have; None for any.

  Returns:
    A tree for each part, whose leaves have `shape` and `dtype`; or are None.

  Raises:
    UserError: if a part is missing, or its description damaged or not that
      which the checkpoint declares.
  """
  place = checkpointer.directory
  path, remedy = place / str(step), remedy_of(place, step)
  _, declared = read_record(place, step)

  def describe():
    # Orbax opens the arrays of all parts to list them.
    for part in PARTS:
      saved_arrays.check_json(os.fspath(path / part), remedy)
    saved = checkpointer.checkpointables_metadata(step).metadata
    for name in names:
      if saved.get(name) is None:
        raise ValueError(f'{name} is absent, or not as Orbax wrote it')
    parts = {name: saved[name] for name in names}
    if declared is not None:
      _check_declared(declared, parts)
      _check_declared(declared, wanted or {})
    return parts

  return _explained(describe, checkpointer, step, names)


def read_array(
  checkpointer: ocp.training.Checkpointer,
  step: int,
  saved: dict[str, Any],
  path: tuple[str, ...],
  sharding: jax.sharding.Sharding,
) -> jax.Array:
  """One array of a checkpoint; no other is read.

  Args:
    checkpointer: from `open_checkpointer`.
    step: of the checkpoint.
    saved: from `saved_parts`.
    path: the part's name, and those under which its tree has the array.
    sharding: of the array; every process reads its own shards.

  Raises:
    UserError: if it is damaged.
  """
  part, *keys = path

  def wanted(place, array):
    if [entry.key for entry in place] != keys:
      return ocp.PLACEHOLDER
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

  tree = jax.tree_util.tree_map_with_path(wanted, saved[part])
  tree = _load(checkpointer, step, {part: tree})[part]
  for key in keys:
    tree = tree[key]
  return tree


def _load(checkpointer, step, wanted) -> dict[str, Any]:
  return _explained(
    lambda: checkpointer.load_checkpointables(step, wanted),
    checkpointer,
    step,
    tuple(wanted),
  )


def _explained(load, checkpointer, step, names) -> Any:
  place = checkpointer.directory
  path = place / str(step)
  folders = [path / name for name in names]
  return orbax_lib.explained(load, path, folders, remedy_of(place, step))


def _check_declared(declared, parts) -> None:
  """Raises ValueError if arrays are not those that the checkpoint declares."""
  described = _described(parts)
  right = {n: a for n, a in declared.items() if n.partition('/')[0] in parts}
  for name in sorted(right.keys() | described.keys()):
    if right.get(name) != described.get(name):
      raise ValueError(
        f'array {name} is {_words(described.get(name))}, and was saved as '
        f'{_words(right.get(name))}'
      )


def _words(described: list[Any] | None) -> str:
  return 'absent' if described is None else f'{described[0]} {described[1]}'


def remedy_of(place: epath.Path, step: int) -> str:
  """How to go on without a checkpoint."""
  others = [other for other in steps(place) if other != step]
  if others:
    return (
      f'delete {place / str(step)}, and the same command goes on from the '
      f'checkpoint of step {others[-1]}'
    )
  return f'there is no other: delete {place / str(step)} and train again'
