"""Metrics of a state on validation rows."""

from collections.abc import Callable
import functools
import math

from absl import logging
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np

from sae_jax import autoencoder, errors, store
from sae_jax import mesh as mesh_lib
from sae_jax.autoencoder import metrics
from sae_jax.feed import rows
from sae_jax.training import state as state_lib
from sae_jax.training.config import TrainConfig
from sae_jax.training.state import TrainState


def span(
  config: TrainConfig,
  data: store.Store,
  mesh: Mesh,
  scored: range | None = None,
) -> tuple[int, int, int]:
  """The rows scored: first, last + 1, and rows of a batch.

  They are `scored`, by default the validation rows that the config wants.
  """
  if scored is None:
    scored = data.validation_rows[: config.eval_rows]
  size = min(config.batch_size, len(scored))
  return scored.start, scored.stop, size - size % mesh.shape['data']


def check_rows(config: TrainConfig, data: store.Store, mesh: Mesh) -> None:
  """Reads the rows that are scored, before a run depends on them.

  Each process of a run reads its share, and all raise if one does.

  Args:
    config: the run.
    data: the store.
    mesh: where the state will lie.

  Raises:
    UserError: if a row cannot be read or is not finite.
  """
  first, last, size = span(config, data, mesh)
  last -= (last - first) % size
  index, count = jax.process_index(), jax.process_count()
  start, stop = (
    first + (last - first) * i // count for i in (index, index + 1)
  )
  error = None
  try:
    for row in range(start, stop, size):
      data.finite_rows(row, min(row + size, stop))
  except errors.UserError as raised:
    error = raised
  if count > 1:
    failed = multihost_utils.process_allgather(np.array(error is not None))
    if failed.any() and error is None:
      error = errors.UserError(
        f'process {int(np.argmax(failed))} cannot use the validation rows '
        f'of store {data.url}: see its error'
      )
  if error is not None:
    raise error


def evaluate(
  config: TrainConfig,
  mesh: Mesh,
  state: TrainState,
  data: store.Store,
  evaluation: Callable[[TrainState, jax.Array], metrics.Sums],
  scored: range | None = None,
) -> metrics.Metrics:
  """Metrics on validation rows, in whole batches.

  Args:
    config: the run.
    mesh: where the state lies.
    state: the state, after at least one step.
    data: the store.
    evaluation: from `make_evaluation`.
    scored: other rows to score, such as the test rows.
  """
  total = None
  first, last, size = span(config, data, mesh, scored)
  for start in range(first, last - size + 1, size):
    rows_BD = rows.read_rows(data, start, size, mesh)
    total = metrics.add_sums(total, evaluation(state, rows_BD))
  result = metrics.summarise(total, float(state.mse_of_mean))
  if math.isnan(result.fvu):
    logging.warning(
      'rows %d to %d of store %s differ by no more than rounding, or their '
      'reconstructions are not finite: they have no FVU',
      first,
      last,
      data.url,
    )
  return result


def scores(
  config: TrainConfig, mesh: Mesh, state: TrainState, data: store.Store
) -> tuple[dict[str, float], dict[str, list[int]]]:
  """Metrics of a state on validation rows by name, and lists by name, to log.

  Names begin with `validation_` for the averaged weights and with
  `validation_last_` for the last ones. The list is the histogram of latents by
  density under the averaged weights, with edges `metrics.DENSITY_EDGES`.
  """
  average = evaluate(config, mesh, state, data, make_evaluation(config, mesh))
  last = average
  # Without an average both are the last weights.
  if config.optimizer.with_defaults().ema_decay:
    last_weights = make_evaluation(config, mesh, average=False)
    last = evaluate(config, mesh, state, data, last_weights)
  scalars = {f'validation_{n}': v for n, v in average.scalars().items()}
  scalars |= {f'validation_last_{n}': v for n, v in last.scalars().items()}
  density = metrics.density_record(average.density_N)
  return scalars, {'validation_log10_density': density['latents']}


def make_evaluation(
  config: TrainConfig, mesh: Mesh, average: bool = True
) -> Callable[[TrainState, jax.Array], metrics.Sums]:
  """The jitted sums of one validation batch.

  Args:
    config: the run.
    mesh: where the state lies.
    average: whether to evaluate the averaged weights, or the last ones.
  """
  ema_decay = config.optimizer.with_defaults().ema_decay
  return _evaluation(config.sae, ema_decay, mesh, average)


@functools.lru_cache(maxsize=16)
def _evaluation(sae_config, ema_decay, mesh, average):
  specs = mesh_lib.specs(state_lib.abstract_sae(sae_config))
  sums = jax.shard_map(
    lambda sae, raw_BD: metrics.evaluate_batch(
      sae_config, sae, raw_BD, data_axis='data', latent_axis='latent'
    ),
    mesh=mesh,
    in_specs=(specs, mesh_lib.RULES.spec('BD')),
    out_specs=mesh_lib.specs_of(metrics.Sums),
  )

  def evaluate(state: TrainState, raw_BD: jax.Array) -> metrics.Sums:
    sae = state.sae
    if average:
      ema = state.optimizer.ema
      sae = autoencoder.averaged(sae, ema.ema, ema.count, ema_decay)
    return sums(sae, raw_BD)

  # Whole on every process, so that each can read it.
  return jax.jit(evaluate, out_shardings=mesh_lib.sharding(mesh, ''))
