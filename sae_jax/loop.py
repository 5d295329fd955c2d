"""The loop over batches, for one run or many from one reading."""

import collections
from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import time
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.sharding import Mesh
import numpy as np
from orbax.checkpoint import v1 as ocp

from sae_jax import checkpoint, metrics, optimizer, preemption, progress
from sae_jax import config as config_lib
from sae_jax import mesh as mesh_lib
from sae_jax.activations import feed, store
from sae_jax.step import (
  make_evaluation,
  make_step,
  TrainConfig,
  TrainState,
)

_READ_AHEAD = 2


def heldout(
  config: TrainConfig, manifest: store.Manifest, mesh: Mesh
) -> tuple[int, int, int]:
  """First held-out row, where the scored ones end, and rows of a batch."""
  first = manifest.n_rows - manifest.holdout_rows
  last = min(manifest.n_rows, first + config.eval_rows)
  size = min(config.batch_size, last - first)
  return first, last, size - size % mesh.shape['data']


def evaluate(
  config: TrainConfig,
  mesh: Mesh,
  state: TrainState,
  data: store.Store,
  evaluation: Callable[[TrainState, jax.Array], metrics.Sums],
) -> metrics.Metrics:
  """Metrics on held-out rows, in whole batches.

  Args:
    config: the run.
    mesh: where the state lies.
    state: the state, after at least one step.
    data: the store.
    evaluation: from `make_evaluation`.
  """
  total = None
  first, last, size = heldout(config, data.manifest, mesh)
  for start in range(first, last - size + 1, size):
    rows = _put(data.read_rows(start, start + size), mesh)
    total = metrics.add_sums(total, evaluation(state, rows))
  return metrics.summarise(total, float(state.mse_of_mean))


def _put(batch_BD: np.ndarray, mesh: Mesh) -> jax.Array:
  return jax.make_array_from_callback(
    batch_BD.shape, mesh_lib.sharding(mesh, 'BD'), lambda i: batch_BD[i]
  )


def _on_devices(
  batches: Iterable[np.ndarray], mesh: Mesh
) -> Iterator[jax.Array]:
  """Batches on the devices, some ahead of the one that is used."""
  waiting = collections.deque()
  for batch_BD in batches:
    waiting.append(_put(batch_BD, mesh))
    if len(waiting) >= _READ_AHEAD:
      yield waiting.popleft()
  yield from waiting


def _parts(state: TrainState) -> dict[str, Any]:
  return {
    'sae': state.sae,
    'ema': state.optimizer.ema,
    'adam': state.optimizer.adam,
    'progress': {
      'silent_N': state.silent_N,
      'mse_of_mean': state.mse_of_mean,
      'step': state.step,
      'skipped': state.skipped,
    },
  }


def restore(
  checkpointer: ocp.training.Checkpointer, wanted: TrainState
) -> TrainState:
  """The latest state, in the shapes and shardings of `wanted`.

  Raises:
    UserError: if it is damaged.
  """
  parts = checkpoint.read(
    checkpointer, checkpointer.latest.step, _parts(wanted)
  )
  return TrainState(
    sae=parts['sae'],
    optimizer=optimizer.OptimizerState(adam=parts['adam'], ema=parts['ema']),
    **parts['progress'],
  )


class Run:
  """One autoencoder in training: its state and where it is written."""

  def __init__(
    self,
    config: TrainConfig,
    workdir: str,
    mesh: Mesh,
    state: TrainState,
    data: store.Store,
    saver: checkpoint.Saver,
  ):
    """Takes a state, which it gives away to its steps."""
    self.config = config
    self.workdir = workdir
    self.state = state
    self.done = self.first = int(state.step)
    self._mesh = mesh
    self._data = data
    self._saver = saver
    self._step = make_step(config, mesh)
    self._about = {
      'train_config': dataclasses.asdict(config),
      'mse_of_mean': float(state.mse_of_mean),
      'dataset': data.about,
      'metric_definitions': checkpoint.METRIC_DEFINITIONS,
    }
    self._writer = metrics.Writer(
      workdir, self.done, active=jax.process_index() == 0
    )
    self._pending = collections.deque()
    self._saved = self.done
    self._began = time.monotonic()
    self.latest = {}

  @property
  def finished(self) -> bool:
    """Whether all its steps are done."""
    return self.done >= self.config.steps

  def advance(self, batch_BD: jax.Array) -> None:
    """Dispatches a step, then takes in the values of the one before."""
    debug = jax.config.jax_debug_nans
    # A transfer nobody meant would make the device wait for the host; a step
    # that is run again by operations, to find a NaN, makes many. JAX forgets
    # to look for NaNs after it has traced, unless the thread asks for it.
    with (
      jax.transfer_guard('allow' if debug else 'disallow'),
      jax.debug_nans(debug),
    ):
      self.state, values = self._step(self.state, batch_BD)
    self.done += 1
    self._pending.append((self.done, values))
    self._take(1)

  def due(self) -> None:
    """Evaluates and saves where the config asks for it after this step."""
    if self._falls_on(self.config.eval_every):
      self._score()
    if self._falls_on(self.config.checkpoint_every):
      self.save()

  def _falls_on(self, every: int) -> bool:
    return self.finished or bool(every and self.done % every == 0)

  def save(self) -> None:
    """Saves the state, unless this step's is saved."""
    if self._saved == self.done:
      return
    self._take(0)
    self._saver.save(self.done, self._begin_save)
    self._saved = self.done

  def finish(self) -> None:
    """Waits until the last state that was saved is there.

    Raises:
      UserError: if it cannot be written.
    """
    self._saver.finish(self.done, self._begin_save)

  def _begin_save(self, checkpointer: ocp.training.Checkpointer):
    # The log must not lag behind what resume starts from.
    self._writer.flush()
    return checkpointer.save_checkpointables_async(
      self.done, _parts(self.state), force=True, custom_metadata=self._about
    )

  def close(self) -> None:
    """Closes its log."""
    try:
      self._writer.close()
    except Exception as error:
      # What is saved has its log; why the run ends matters more.
      logging.warning(
        'cannot write the log of %s: %s',
        self.workdir,
        config_lib.reason(error),
      )

  def _score(self) -> None:
    self._take(0)
    rows = {}
    for prefix, average in (('heldout', True), ('heldout_last', False)):
      evaluation = make_evaluation(self.config, self._mesh, average)
      found = evaluate(
        self.config, self._mesh, self.state, self._data, evaluation
      )
      rows |= {f'{prefix}_{n}': v for n, v in found.scalars().items()}
      if average:
        density = metrics.density_record(found.density_N)
    self._writer.write(
      self.done, rows, lists={'heldout_log10_density': density['latents']}
    )

  def _take(self, keep: int) -> None:
    """Takes in the values of all but the latest steps."""
    while len(self._pending) > keep:
      done, values = self._pending.popleft()
      values = {n: v.item() for n, v in jax.device_get(values).items()}
      if not values.pop('finite'):
        self._not_finite(done, values)
      self.latest = values
      if done % self.config.log_every == 0 or done == self.config.steps:
        seconds = time.monotonic() - self._began
        speed = (done - self.first) * self.config.batch_size / seconds
        self._writer.write(done, values, {'tokens_per_s': speed})

  def _not_finite(self, done: int, values: dict[str, float]) -> None:
    """Raises, or says which step was skipped, and what its batch is."""
    order = feed.train_order(
      self._data, self.config.order_seed, self.config.window_chunks
    )
    size = self.config.batch_size
    rows = feed.rows_at(order, (done - 1) * size, size)
    batch_BD = feed.Feed(self._data, order, size).batch(done - 1)
    bad = rows[~np.isfinite(batch_BD).all(1)]
    which = (
      f'store row {bad[0]} is not finite, one of {len(bad)} such rows'
      if len(bad)
      else f'its {size} store rows, {rows[0]} to {rows[-1]}, are finite'
    )
    said = (
      f'loss {values["loss"]:.6g}, gradient norm {values["grad_norm"]:.6g} at '
      f'step {done} of {self.workdir} (batch {done - 1} of order_seed '
      f'{self.config.order_seed}: {which})'
    )
    if self.config.on_nonfinite == 'skip':
      logging.warning('%s: skipped', said)
      return
    self._saver.wait()
    latest = self._saver.checkpointer.latest
    good = (
      f'the checkpoint of step {latest.step} is good'
      if latest
      else 'there is no checkpoint yet'
    )
    raise FloatingPointError(
      f'{said}: {good}; lower the learning rate, mend the store, or go on with '
      '--on_nonfinite=skip'
    )


@contextlib.contextmanager
def _profile(config: TrainConfig, workdir: str) -> Iterator[Callable]:
  """A function to call before each step; it traces those that are asked for."""
  first = config.profile_start
  last = first + config.profile_steps
  tracing = False

  def before(step: int, wait: Callable[[], None]) -> None:
    nonlocal tracing
    if step == first and config.profile_steps:
      wait()
      jax.profiler.start_trace(str(epath.Path(workdir) / 'profile'))
      tracing = True
    elif step == last and tracing:
      wait()
      jax.profiler.stop_trace()
      tracing = False
      logging.info('steps %d to %d are profiled', first, last - 1)

  try:
    yield before
  finally:
    if tracing:
      jax.profiler.stop_trace()


def run_all(runs: list[Run], batches: Iterable[np.ndarray], mesh: Mesh) -> None:
  """Trains all runs on the same batches, until the last is finished.

  A run that was saved later than the others waits until they have caught up.
  On SIGTERM every run is saved and the loop ends.

  Args:
    runs: they share batch size and order.
    batches: from the first step that any of them still has to do.
    mesh: where the states lie.
  """
  config = runs[0].config
  start = min(run.done for run in runs)
  total = max(run.config.steps for run in runs)
  with (
    preemption.Notice() as notice,
    _profile(config, runs[0].workdir) as profile,
    progress.bar(
      total=total * config.batch_size,
      unit='tok',
      desc='train' if len(runs) == 1 else f'train {len(runs)}',
      initial=start * config.batch_size,
    ) as bar,
  ):
    for step, batch_BD in enumerate(_on_devices(batches, mesh), start + 1):
      profile(step, lambda: jax.block_until_ready([r.state for r in runs]))
      ready = [run for run in runs if run.done == step - 1 and not run.finished]
      for run in ready:
        run.advance(batch_BD)
      for run in ready:
        run.due()
      # None, where one has ended and the next goes on from a later step.
      shown = ready[0].latest if ready else {}
      bar.set_postfix(
        {
          name: f'{shown[name]:.3g}'
          for name in ('nmse', 'l0', 'dead_fraction')
          if name in shown
        },
        refresh=False,
      )
      bar.update(config.batch_size)
      if notice.asked(step):
        for run in runs:
          run.save()
        logging.info('SIGTERM: saved after step %d', step)
        break
    for run in runs:
      run.finish()
