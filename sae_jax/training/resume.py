"""Where a run begins: fresh, or where an earlier process stopped."""

import contextlib
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from sae_jax import checkpoint, errors
from sae_jax import config as config_lib
from sae_jax.storage import claim, files
from sae_jax.training import run
from sae_jax.training.config import TrainConfig
from sae_jax.training.state import abstract_state, init_state, TrainState


def _check_same(
  config: TrainConfig,
  workdir: str,
  dataset: dict[str, Any],
  saved: checkpoint.Metadata,
) -> None:
  """Raises UserError if the workdir's checkpoints are of another run."""
  old_config = config_lib.from_dict(TrainConfig, saved.train_config)
  old = config_lib.flat(old_config)
  may_change = set(config_lib.names_with(TrainConfig, 'may_change'))
  # No step before the end depends on where it is, unless the rate decays.
  if not config.optimizer.decay_steps:
    may_change.add('steps')
  changed = [
    f'{name}: {old[name]!r} -> {value!r}'
    for name, value in config_lib.flat(config).items()
    if old[name] != value and name not in may_change
  ]
  changed += [
    f'{name} of the data: {saved.dataset[name]} -> {dataset[name]}'
    for name in ('site', 'identity')
    if saved.dataset[name] != dataset[name]
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


def first_state(
  config, workdir, mesh, data, checkpointer
) -> tuple[TrainState, dict[str, Any]]:
  """The state a run starts or goes on from, and the cursor of its batches."""
  if checkpointer.latest is None:
    sample_BD = data.read_rows(0, min(config.sample_rows, data.n_train))
    return init_state(config, mesh, sample_BD), {}
  saved = checkpoint.read_metadata(checkpointer, checkpointer.latest.step)
  _check_same(config, workdir, data.about, saved)
  state = run.restore(checkpointer, abstract_state(config, mesh))
  logging.info('%s resumes after step %d', workdir, int(state.step))
  return state, saved.feed


def claim_workdir(workdir: str, stack: contextlib.ExitStack) -> None:
  """Keeps the workdir for this run: process 0 has it and all of them see it.

  Every process returns or every one raises, so that none waits for another.
  """
  if jax.process_count() == 1:
    stack.enter_context(claim.claim(workdir))
    return
  seed = np.random.default_rng().integers(2**31)
  number = int(multihost_utils.broadcast_one_to_all(seed))
  path = epath.Path(workdir) / f'.seen_by_all_{number}'
  error = None
  if jax.process_index() == 0:
    try:
      stack.enter_context(claim.claim(workdir))
      files.write_text(path, '')
    except (errors.UserError, OSError) as found:
      error = found
  if multihost_utils.broadcast_one_to_all(np.array(error is not None)):
    raise error or errors.UserError(
      f'process 0 cannot use workdir {workdir}: see what it says'
    )
  seen = multihost_utils.process_allgather(np.array(path.exists()))
  if jax.process_index() == 0:
    path.unlink()
  if not seen.all():
    raise errors.UserError(
      f'workdir {workdir} is local to a host: {int((~seen).sum())} of '
      f'{jax.process_count()} processes do not see what process 0 writes '
      'there; use a bucket or a shared disk'
    )
