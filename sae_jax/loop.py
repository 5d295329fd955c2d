"""The loop over batches, for one run or many from one reading."""

import collections
from collections.abc import Callable, Generator, Iterator
import contextlib
import dataclasses
import functools
import time
from typing import Any, Protocol

from absl import logging
from etils import epath
import jax
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from sae_jax import checkpoint, metrics, optimizer, preemption, progress
from sae_jax import config as config_lib
from sae_jax import mesh as mesh_lib
from sae_jax.activations import store
from sae_jax.step import (
  make_evaluation,
  make_step,
  TrainState,
)
from sae_jax.train_config import TrainConfig


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
    rows_BD = _rows(data, start, size, mesh)
    total = metrics.add_sums(total, evaluation(state, rows_BD))
  return metrics.summarise(total, float(state.mse_of_mean))


def _rows(data: store.Store, start: int, size: int, mesh: Mesh) -> jax.Array:
  """Rows on the devices; a process reads what its own devices hold."""
  # Devices that differ in their latents alone hold the same rows.
  read = functools.cache(
    lambda first, stop: data.read_rows(start + first, start + stop)
  )
  return jax.make_array_from_callback(
    (size, data.manifest.d_model),
    mesh_lib.sharding(mesh, 'BD'),
    lambda index: read(*index[0].indices(size)[:2]),
  )


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


class Batches(Protocol):
  """What runs are trained on, `feed.Feed` or `stream.Feed`.

  Attributes:
    bytes_read: from a store, so far; None where none is read.
  """

  bytes_read: int | None

  def iterate(
    self, start_step: int, stop_step: int | None = None
  ) -> Generator[jax.Array, None, None]:
    """Batches of steps, on the devices; to be closed."""

  def cursor(self, step: int) -> dict[str, Any]:
    """What goes into a checkpoint to go on after a step."""

  def describe(self, step: int) -> str:
    """Where a step's batch comes from, and whether it is finite."""


class Run:
  """One autoencoder in training: its state and where it is written.

  Attributes:
    done: steps done.
    latest: values of the last step that were taken in.
    reading: how its batches come, which is told with them.
  """

  def __init__(
    self,
    config: TrainConfig,
    workdir: str,
    mesh: Mesh,
    state: TrainState,
    data: store.Store,
    batches: Batches,
    saver: checkpoint.Saver,
  ):
    """Takes a state, which it gives away to its steps."""
    self.config = config
    self.workdir = workdir
    self.state = state
    self.done = self.first = int(state.step)
    self._mesh = mesh
    self._data = data
    self._batches = batches
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
    self.reading = {}

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
    self._cursor = self._batches.cursor(self.done)
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
      self.done,
      _parts(self.state),
      force=True,
      custom_metadata=self._about | {'feed': self._cursor},
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
        told = {'tokens_per_s': speed} | self.reading
        self._writer.write(done, values, told)

  def _not_finite(self, done: int, values: dict[str, float]) -> None:
    """Raises, or says which step was skipped, and what its batch is."""
    which = self._batches.describe(done - 1)
    said = (
      f'loss {values["loss"]:.6g}, gradient norm {values["grad_norm"]:.6g} at '
      f'step {done} of {self.workdir} (batch {done - 1} of order_seed '
      f'{self.config.order_seed}: {which})'
    )
    if self.config.on_nonfinite == 'skip':
      logging.warning('%s: skipped', said)
      return
    latest = self._saver.latest()
    good = (
      f'the checkpoint of step {latest} is good'
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


class Clock:
  """How long the loop waits for batches, from the second on.

  Before the second the first window is read, and the step is compiled.
  """

  def __init__(self, batches: Batches):
    self._batches = batches
    self._began = None
    self._waited = 0.0

  def timed(self, items: Iterator[jax.Array]) -> Iterator[jax.Array]:
    """The items, each of which is waited for."""
    while True:
      asked = time.monotonic()
      item = next(items, None)
      if item is None:
        return
      if self._began is not None:
        self._waited += time.monotonic() - asked
      yield item
      if self._began is None:
        self._began = time.monotonic()
        self._bytes = self._batches.bytes_read

  def told(self) -> dict[str, float]:
    """The share of the time that was waited, and bytes read a second.

    The device works on the step before meanwhile: it was idle no longer.
    Nothing is told of a stream, which makes batches where steps are made.
    """
    if self._began is None or self._batches.bytes_read is None:
      return {}
    seconds = max(time.monotonic() - self._began, 1e-9)
    return {
      'feed_wait_share': self._waited / seconds,
      'feed_bytes_per_s': (self._batches.bytes_read - self._bytes) / seconds,
    }


def run_all(runs: list[Run], batches: Batches) -> None:
  """Trains all runs on the same batches, until the last is finished.

  A run that was saved later than the others waits until they have caught up.
  On SIGTERM every run is saved and the loop ends.

  Args:
    runs: they share batch size and order.
    batches: on the devices of their states.
  """
  config = runs[0].config
  start = min(run.done for run in runs)
  total = max(run.config.steps for run in runs)
  clock = Clock(batches)
  with (
    preemption.Notice() as notice,
    _profile(config, runs[0].workdir) as profile,
    progress.bar(
      total=total * config.batch_size,
      unit='tok',
      desc='train' if len(runs) == 1 else f'train {len(runs)}',
      initial=start * config.batch_size,
    ) as bar,
    contextlib.closing(batches.iterate(start, total)) as ready_batches,
  ):
    for step, batch_BD in enumerate(clock.timed(ready_batches), start + 1):
      profile(step, lambda: jax.block_until_ready([r.state for r in runs]))
      ready = [run for run in runs if run.done == step - 1 and not run.finished]
      for run in ready:
        run.reading = clock.told()
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
    told = clock.told()
    for run in runs:
      run.finish()
  if told:
    logging.info(
      'batches were waited for %.1f %% of the time, %.1f MB/s were read',
      100 * told['feed_wait_share'],
      told['feed_bytes_per_s'] / 1e6,
    )
