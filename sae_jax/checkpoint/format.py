"""What a checkpoint holds; opening, saving and reading one.

A checkpoint is an Orbax bundle of the arrays in `Contents`, a part for each
field, and `Metadata` as JSON. Whoever wants one part reads no other, and no
reader needs what made them: names, shapes and dtypes are in the checkpoint.
"""

import dataclasses
from typing import Any

from etils import epath
import jax
from orbax.checkpoint import v1 as ocp

from sae_jax import autoencoder, errors
from sae_jax import config as config_lib
from sae_jax.storage import orbax as orbax_lib
from sae_jax.storage import url as url_lib

# What a run has counted, scalars but for `silent_N`.
PROGRESS = ('silent_N', 'mse_of_mean', 'step', 'skipped')


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
  def sample_rows(self) -> int:
    """Rows at the start of the store that the run was fitted to, at most."""
    return self.train_config['sample_rows']

  @property
  def dataset_version(self) -> int:
    """The store's version; checkpoints older than versions name none."""
    return self.dataset.get('version', 1)


def open_checkpointer(workdir: str, keep: int = 2) -> ocp.training.Checkpointer:
  """Opens a run's checkpoints; close it, or use it as a context manager.

  Args:
    workdir: the run's folder or URL.
    keep: how many of the latest are kept.
  """
  return ocp.training.Checkpointer(
    folder(workdir),
    context=orbax_lib.context(workdir),
    preservation_policy=ocp.training.preservation_policies.LatestN(keep),
    cleanup_tmp_directories=True,
  )


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
  return checkpointer.save_checkpointables_async(
    step,
    contents.parts(),
    force=True,
    custom_metadata=dataclasses.asdict(metadata),
  )


def read_metadata(
  checkpointer: ocp.training.Checkpointer, step: int
) -> Metadata:
  """The metadata of a checkpoint.

  Raises:
    UserError: if it is damaged, or another version of sae_jax wrote it.
  """
  try:
    values = checkpointer.metadata(step).custom_metadata or {}
    absent = {'train_config', 'mse_of_mean', 'dataset'} - set(values)
    if absent:
      raise KeyError(f'no {", ".join(sorted(absent))}')
  except (KeyError, ValueError, OSError) as error:
    raise _damaged(checkpointer, step, error) from error
  return config_lib.from_dict(Metadata, {'metric_definitions': {}} | values)


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
  parts = _read_parts(checkpointer, step, lambda _: wanted.parts())
  return Contents(**parts | {'sae': autoencoder.from_dict(parts['sae'])})


def read_parameters(
  checkpointer: ocp.training.Checkpointer,
  step: int,
  sharding: jax.sharding.Sharding,
) -> tuple[autoencoder.Sae, dict[str, Any]]:
  """The parameters of a checkpoint and their moving average.

  Args:
    checkpointer: from `open_checkpointer`.
    step: of the checkpoint.
    sharding: where every array is put.

  Returns:
    The parameters, and the part `ema` of `Contents`.

  Raises:
    UserError: if they are missing or damaged.
  """

  def wanted(saved):
    return jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
      {name: saved[name] for name in ('sae', 'ema')},
    )

  parts = _read_parts(checkpointer, step, wanted)
  return autoencoder.from_dict(parts['sae']), parts['ema']


def _read_parts(checkpointer, step, wanted) -> dict[str, Any]:
  """Parts by name; `wanted` gives arrays to read, from those that are saved."""
  try:
    saved = checkpointer.checkpointables_metadata(step).metadata
    parts = wanted(saved)
    # Once a parameter that an activation has not was saved as None. Orbax asks
    # for the very names that were saved.
    nothing = {name: None for name, a in saved['sae'].items() if a is None}
    parts = parts | {'sae': nothing | parts['sae']}
    parts = checkpointer.load_checkpointables(step, parts)
  except (KeyError, ValueError, OSError) as error:
    raise _damaged(checkpointer, step, error) from error
  arrays = {n: a for n, a in parts['sae'].items() if a is not None}
  return parts | {'sae': arrays}


def _damaged(checkpointer, step: int, error: Exception) -> errors.UserError:
  path = epath.Path(checkpointer.directory) / str(step)
  return errors.UserError(
    f'checkpoint {path} cannot be read ({type(error).__name__}: '
    f'{errors.reason(error)}): check your access; if it is damaged, delete '
    'that folder to go on from the one before'
  )
