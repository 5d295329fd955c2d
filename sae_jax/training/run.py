"""One autoencoder in training: its state and where it is written."""

import collections
import dataclasses
import time

from absl import logging
import jax
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from sae_jax import checkpoint, errors, store
from sae_jax.autoencoder import metrics
from sae_jax.feed.batches import Batches
from sae_jax.training import evaluation, log, optimizer
from sae_jax.training import saver as saver_lib
from sae_jax.training.config import TrainConfig
from sae_jax.training.state import TrainState
from sae_jax.training.step import make_step


def contents(state: TrainState) -> checkpoint.Contents:
  """The parts of a state that a checkpoint holds."""
  return checkpoint.Contents(
    sae=state.sae,
    ema=state.optimizer.ema,
    adam=state.optimizer.adam,
    progress={name: getattr(state, name) for name in checkpoint.PROGRESS},
  )


def restore(
  checkpointer: ocp.training.Checkpointer, abstract: TrainState
) -> TrainState:
  """The latest state, in the shapes and shardings of `abstract`.

  Raises:
    UserError: if it is damaged.
  """
  saved = checkpoint.read(
    checkpointer, checkpointer.latest.step, contents(abstract)
  )
  return TrainState(
    sae=saved.sae,
    optimizer=optimizer.OptimizerState(adam=saved.adam, ema=saved.ema),
    **saved.progress,
  )


class Run:
  """One autoencoder in training: its state and where it is written.

  Attributes:
    done: number of steps that are dispatched.
    latest: metrics of the last step that were read from the device.
  """

  def __init__(
    self,
    config: TrainConfig,
    workdir: str,
    mesh: Mesh,
    state: TrainState,
    data: store.Store,
    batches: Batches,
    saver: saver_lib.Saver,
  ):
    """Takes over a state: the steps donate its arrays."""
    self.config = config
    self.workdir = workdir
    self.state = state
    self.done = self.first = int(state.step)
    self._mesh = mesh
    self._data = data
    self._batches = batches
    self._saver = saver
    self._step = make_step(config, mesh)
    self._metadata = checkpoint.Metadata(
      train_config=dataclasses.asdict(config),
      mse_of_mean=float(state.mse_of_mean),
      dataset=data.about,
      metric_definitions=metrics.METRIC_DEFINITIONS,
    )
    self._writer = log.Writer(
      workdir, self.done, active=jax.process_index() == 0
    )
    self._pending = collections.deque()
    self._feed_metrics = {}
    self._saved = self.done
    self._began = time.monotonic()
    self.latest = {}

  @property
  def finished(self) -> bool:
    """Whether all its steps are done."""
    return self.done >= self.config.steps

  def advance(
    self, batch_BD: jax.Array, feed_metrics: dict[str, float] | None = None
  ) -> None:
    """Dispatches a step, then reads the metrics of the one before.

    Args:
      batch_BD: raw activations, sharded over "data".
      feed_metrics: metrics of the feed so far, for TensorBoard only.
    """
    self._feed_metrics = feed_metrics or {}
    debug = jax.config.jax_debug_nans
    # An unintended transfer would make the device wait for the host, so it is
    # an error; a step that is run again operation by operation, to find a NaN,
    # needs many. After tracing JAX only looks for NaNs if the thread sets it.
    with (
      jax.transfer_guard('allow' if debug else 'disallow'),
      jax.debug_nans(debug),
    ):
      self.state, values = self._step(self.state, batch_BD)
    self.done += 1
    self._pending.append((self.done, values))
    self._take(1)

  def due(self) -> None:
    """Evaluates and saves if the config says so for this step."""
    if self._falls_on(self.config.eval_every):
      self._score()
    if self._falls_on(self.config.checkpoint_every):
      self.save()

  def _falls_on(self, every: int) -> bool:
    return self.finished or bool(every and self.done % every == 0)

  def save(self) -> None:
    """Saves the state, unless that of this step is saved already."""
    if self._saved == self.done:
      return
    self._take(0)
    self._metadata = dataclasses.replace(
      self._metadata, feed=self._batches.cursor(self.done)
    )
    self._saver.save(self.done, self._begin_save)
    self._saved = self.done

  def finish(self) -> None:
    """Waits until the last save is complete.

    Raises:
      UserError: if it cannot be written.
    """
    self._saver.finish(self.done, self._begin_save)

  def _begin_save(self, checkpointer: ocp.training.Checkpointer):
    # The log must not lag behind the state that a resumed run starts from.
    self._writer.flush()
    return checkpoint.save(
      checkpointer, self.done, contents(self.state), self._metadata
    )

  def close(self) -> None:
    """Closes its log."""
    try:
      self._writer.close()
    except Exception as error:
      # The log is complete up to the last checkpoint, and the error that ended
      # the run matters more.
      logging.warning(
        'cannot write the log of %s: %s',
        self.workdir,
        errors.reason(error),
      )

  def _score(self) -> None:
    self._take(0)
    scalars, lists = evaluation.scores(
      self.config, self._mesh, self.state, self._data
    )
    self._writer.write(self.done, scalars, lists=lists)

  def _take(self, keep: int) -> None:
    """Reads and logs the metrics of all but the latest `keep` steps."""
    while len(self._pending) > keep:
      done, values = self._pending.popleft()
      values = {n: v.item() for n, v in jax.device_get(values).items()}
      if not values.pop('finite'):
        self._skip_or_stop(done, values)
      self.latest = values
      if done % self.config.log_every == 0 or done == self.config.steps:
        seconds = time.monotonic() - self._began
        speed = (done - self.first) * self.config.batch_size / seconds
        speeds = {'tokens_per_s': speed} | self._feed_metrics
        self._writer.write(done, values, board_only=speeds)

  def _skip_or_stop(self, done: int, values: dict[str, float]) -> None:
    """Logs a step that is not finite, if the config skips such steps.

    Raises:
      FloatingPointError: if it stops at them.
    """
    step = (
      f'loss {values["loss"]:.6g}, gradient norm {values["grad_norm"]:.6g} at '
      f'step {done} of {self.workdir} (batch {done - 1} of order_seed '
      f'{self.config.order_seed}: {self._batches.describe(done - 1)})'
    )
    if self.config.on_nonfinite == 'skip':
      logging.warning('%s: skipped', step)
    else:
      raise FloatingPointError(
        f'{step}: {self._last_good()}; lower the learning rate, mend the '
        'store, or go on with --on_nonfinite=skip'
      )

  def _last_good(self) -> str:
    latest = self._saver.latest()
    if latest is None:
      return 'there is no checkpoint yet'
    return f'the checkpoint of step {latest} is good'
