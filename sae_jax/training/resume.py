"""Where a run begins: fresh, or where an earlier process stopped."""

import contextlib
import dataclasses
from typing import Any

from absl import logging
from jax.sharding import Mesh

from sae_jax import checkpoint, errors, store
from sae_jax import config as config_lib
from sae_jax import mesh as mesh_lib
from sae_jax.storage import claim, joined
from sae_jax.storage import url as url_lib
from sae_jax.storage import workdir as workdir_lib
from sae_jax.training import defaults, run
from sae_jax.training import saver as saver_lib
from sae_jax.training.config import TrainConfig
from sae_jax.training.state import abstract_state, init_state, TrainState

_STAGE = 'sae-train'
# What a workdir of training has: one of them at least, however it ended.
_MARKS = {'checkpoints': (), 'config.json': ('sae', 'optimizer')}


def _made_from(config: TrainConfig, dataset: dict[str, Any]) -> dict[str, Any]:
  """What may not differ between a run and its resumption."""
  may_change = set(config_lib.names_with(TrainConfig, 'may_change'))
  # No step depends on the number of steps, unless the rate decays.
  if not config.optimizer.with_defaults().decay_steps:
    may_change.add('steps')
  values = {
    name: value
    for name, value in config_lib.flat(config).items()
    if name not in may_change
  }
  # The site's name is both a field of the config and one of the data.
  return values | {
    f'{name} of the data': dataset.get(name) for name in ('site', 'identity')
  }


def _check_same(
  config: TrainConfig,
  workdir: str,
  dataset: dict[str, Any],
  saved: checkpoint.Metadata,
) -> None:
  """Raises UserError if the workdir's checkpoints are of another run."""
  old_config = config_lib.from_dict(TrainConfig, saved.train_config)
  old = config_lib.flat(old_config) | _made_from(old_config, saved.dataset)
  changed = [
    f'{name}: {old[name]!r} -> {value!r}'
    for name, value in _made_from(config, dataset).items()
    if old[name] != value
  ]
  if saved.dataset_version < dataset['version']:
    changed.append(
      'the store got another version: --store_version='
      f'{saved.dataset_version} is that of the run'
    )
  if changed:
    raise errors.UserError(
      f'{workdir} holds a run with another config ({"; ".join(changed)}): '
      'use another workdir, or the same settings to resume'
    )


@dataclasses.dataclass(frozen=True)
class Start:
  """Where a run begins.

  Attributes:
    config: the run's config.
    workdir: the run's workdir, which this process has claimed.
    state: a fresh state, or that of the latest checkpoint.
    cursor: place of the next batch, if the batches keep a cursor.
    saver: the saver of the workdir's checkpoints, opened.
  """

  config: TrainConfig
  workdir: str
  state: TrainState
  cursor: dict[str, Any]
  saver: saver_lib.Saver

  @property
  def finished(self) -> bool:
    """Whether all its steps are done."""
    return int(self.state.step) >= self.config.steps


def start(
  config: TrainConfig,
  workdir: str,
  mesh: Mesh,
  data: store.Store,
  stack: contextlib.ExitStack,
) -> Start:
  """Claims a workdir and finds out where its run begins.

  Args:
    config: the run's config.
    workdir: the run's workdir.
    mesh: mesh on which the state is put.
    data: store that the run trains on.
    stack: closes the checkpoints, then releases the workdir.

  Raises:
    UserError: if another process has the workdir, or its checkpoint is damaged
      or of another run.
  """
  mesh_lib.log_devices(workdir)
  claim_workdir(workdir, stack)
  saver = stack.enter_context(saver_lib.Saver(workdir, config.checkpoint_keep))
  latest = saver.checkpointer.latest
  if latest is None:
    _sign(config, workdir, data)
    defaults.log(config)
    sample_BD = data.finite_rows(0, min(config.sample_rows, data.n_train))
    state = init_state(config, mesh, sample_BD)
    return Start(config, workdir, state, {}, saver)
  saved = checkpoint.read_metadata(saver.checkpointer, latest.step)
  _check_same(config, workdir, data.about, saved)
  _sign(config, workdir, data)
  state = run.restore(saver.checkpointer, abstract_state(config, mesh))
  if int(state.step) != latest.step:
    raise errors.UserError(
      f'{saver.checkpointer.directory}/{latest.step} holds the checkpoint of '
      f'step {int(state.step)}: give the folder that name'
    )
  resumed = Start(config, workdir, state, saved.feed, saver)
  logging.info(
    '%s %s step %d',
    workdir,
    'is finished:' if resumed.finished else 'resumes after',
    int(state.step),
  )
  return resumed


def claim_workdir(workdir: str, stack: contextlib.ExitStack) -> None:
  """Claims the workdir, see `joined.claim`.

  A folder that is somebody else's is refused.
  """

  def take():
    stack.enter_context(claim.claim(workdir))
    workdir_lib.check_own(workdir, _STAGE, _MARKS)

  joined.claim(workdir, take)


def _sign(config: TrainConfig, workdir: str, data: store.Store) -> None:
  """Keeps runs of other settings out of a workdir that cannot be claimed."""
  if not url_lib.is_remote(workdir):
    return
  made_from = config_lib.through_json(_made_from(config, data.about))
  joined.by_first(workdir, lambda: workdir_lib.sign(workdir, _STAGE, made_from))
