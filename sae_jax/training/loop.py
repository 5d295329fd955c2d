"""The loop over batches, for one run or several on the same batches."""

from collections.abc import Callable, Iterator
import contextlib
import time

from absl import logging
from etils import epath
import jax

from sae_jax import progress
from sae_jax.feed.batches import Batches
from sae_jax.training import preemption
from sae_jax.training.config import TrainConfig
from sae_jax.training.run import Run


@contextlib.contextmanager
def _profile(config: TrainConfig, workdir: str) -> Iterator[Callable]:
  """A function to call before each step; it profiles the configured steps."""
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
  """How long the loop waits for batches, from the second batch on.

  Before that the first window is read and the step is compiled.
  """

  def __init__(self, batches: Batches):
    self._batches = batches
    self._began = None
    self._waited = 0.0

  def timed(self, items: Iterator[jax.Array]) -> Iterator[jax.Array]:
    """The items; the time spent waiting for them is added up."""
    while True:
      began = time.monotonic()
      item = next(items, None)
      if item is None:
        return
      if self._began is not None:
        self._waited += time.monotonic() - began
      yield item
      if self._began is None:
        self._began = time.monotonic()
        self._bytes = self._batches.bytes_read

  def metrics(self) -> dict[str, float]:
    """The share of time spent waiting, and bytes read per second.

    While the loop waits the device works on the step before, so it was idle for
    at most this share. Empty before the second batch, and for streams, whose
    batches are computed on the same devices.
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

  A run that has done more steps than the others waits for them to catch up.
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
        run.advance(batch_BD, clock.metrics())
      for run in ready:
        run.due()
      # No run is ready after one has ended and before the next goes on.
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
    feed_metrics = clock.metrics()
    for run in runs:
      run.finish()
  if feed_metrics:
    logging.info(
      'batches were waited for %.1f %% of the time, %.1f MB/s were read',
      100 * feed_metrics['feed_wait_share'],
      feed_metrics['feed_bytes_per_s'] / 1e6,
    )
