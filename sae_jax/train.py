"""Training: the loop over batches, with metrics, checkpoints and resume."""

from collections.abc import Callable
import dataclasses
import time
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.sharding import Mesh
import numpy as np

from sae_jax import checkpoint, files, metrics, optimizer, progress
from sae_jax import config as config_lib
from sae_jax import mesh as mesh_lib
from sae_jax.activations import feed, store
from sae_jax.step import (
  abstract_state,
  init_state,
  make_evaluation,
  make_step,
  TrainConfig,
  TrainState,
)

# What may change when a run is resumed: where it runs and what it tells.
_MAY_CHANGE = frozenset(
  (
    'mesh_data',
    'mesh_latent',
    'log_every',
    'eval_every',
    'eval_rows',
    'checkpoint_every',
    'checkpoint_keep',
  )
)


def _heldout(
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
  first, last, size = _heldout(config, data.manifest, mesh)
  for start in range(first, last - size + 1, size):
    rows = _put(data.read_rows(start, start + size), mesh)
    total = metrics.add_sums(total, evaluation(state, rows))
  return metrics.summarise(total, float(state.mse_of_mean))


def _put(batch_BD: np.ndarray, mesh: Mesh) -> jax.Array:
  return jax.make_array_from_callback(
    batch_BD.shape, mesh_lib.sharding(mesh, 'BD'), lambda i: batch_BD[i]
  )


def check(config: TrainConfig, manifest: store.Manifest, mesh: Mesh) -> None:
  """Raises UserError where config, store and mesh do not fit each other."""
  if config.sae.d_model != manifest.d_model:
    raise config_lib.UserError(
      f'd_model {config.sae.d_model} is not the width {manifest.d_model} of '
      f'the store: use --d_model={manifest.d_model}, or 0 to take the '
      "store's"
    )
  mesh_lib.check_divides('batch_size', config.batch_size, mesh, 'data')
  mesh_lib.check_divides('n_latents', config.sae.n_latents, mesh, 'latent')
  if _heldout(config, manifest, mesh)[2] < 2:
    raise config_lib.UserError(
      f'the store holds {manifest.holdout_rows} rows out, an evaluation needs '
      f'{max(2, mesh.shape["data"])}: harvest with a larger holdout_fraction'
    )
  # Refuses a schedule that does not fit the run.
  optimizer.learning_rate(config.optimizer, config.sae.n_latents, config.steps)


def resolve(config: TrainConfig, manifest: store.Manifest) -> TrainConfig:
  """The config with what it leaves to the store: d_model where it is 0."""
  d_model = config.sae.d_model or manifest.d_model
  return dataclasses.replace(
    config, sae=dataclasses.replace(config.sae, d_model=d_model)
  )


def _check_same(
  config: TrainConfig, workdir: str, identity: str, about: dict[str, Any]
) -> None:
  """Raises UserError if the workdir's checkpoints are of another run."""
  old = config_lib.from_dict(TrainConfig, about['train_config'])
  found = config_lib.flat(old)
  changed = [
    f'{name}: {found[name]!r} -> {value!r}'
    for name, value in config_lib.flat(config).items()
    if found[name] != value and name not in _MAY_CHANGE
  ]
  if about['dataset']['identity'] != identity:
    changed.append(f'dataset: {about["dataset"]["identity"]} -> {identity}')
  if changed:
    raise config_lib.UserError(
      f'{workdir} holds a run with another config ({"; ".join(changed)}): '
      'use another workdir, or the same settings to resume'
    )


def train(config: TrainConfig, store_url: str, workdir: str) -> TrainState:
  """Trains an autoencoder, or goes on where a run of the same config stopped.

  The workdir gets config.json, metrics.jsonl, tensorboard/ and checkpoints/.

  Args:
    config: the run.
    store_url: a finished activation store, local path or gs:// URL.
    workdir: local path or gs:// URL; one run each.

  Returns:
    The final state, on the mesh.

  Where and how often it is logged, evaluated and saved may change between a
  run and its resumption, and so may the mesh; nothing else.

  Raises:
    UserError: if config, store, mesh and workdir do not fit, or the latest
      checkpoint is damaged.
    FloatingPointError: if the loss is not finite.
  """
  data = store.open_store(store_url)
  config = resolve(config, data.manifest)
  mesh = mesh_lib.make_mesh(config.mesh_data, config.mesh_latent)
  check(config, data.manifest, mesh)
  mesh_lib.log_devices(workdir)
  with checkpoint.open_checkpointer(
    workdir, config.checkpoint_every, config.checkpoint_keep
  ) as checkpointer:
    if checkpointer.latest is not None:
      about = checkpoint.about(checkpointer, checkpointer.latest.step)
      _check_same(config, workdir, data.manifest.identity, about)
      state = _restore(checkpointer, abstract_state(config, mesh))
    else:
      sample_BD = data.read_rows(0, min(config.sample_rows, data.n_train))
      state = init_state(config, mesh, sample_BD)
    start = int(state.step)
    if start >= config.steps:
      logging.info('%s is finished: step %d', workdir, start)
      return state
    if start:
      logging.info('%s resumes after step %d', workdir, start)
    if jax.process_index() == 0:
      files.write_text(
        epath.Path(workdir) / 'config.json', config_lib.to_json(config)
      )
    order = feed.train_order(data, config.seed, config.window_chunks)
    batches = feed.Feed(data, order, config.batch_size).iterate(
      start, config.steps
    )
    writer = metrics.Writer(workdir, start, active=jax.process_index() == 0)
    try:
      return _loop(config, mesh, state, data, batches, checkpointer, writer)
    finally:
      batches.close()
      writer.close()


def _loop(config, mesh, state, data, batches, checkpointer, writer):
  step_fn = make_step(config, mesh)
  evaluation = make_evaluation(config, mesh)
  about = {
    'train_config': dataclasses.asdict(config),
    'mse_of_mean': float(state.mse_of_mean),
    'dataset': dataclasses.asdict(data.manifest),
    'metric_definitions': checkpoint.METRIC_DEFINITIONS,
  }
  start, pending, began = int(state.step), None, time.monotonic()
  with progress.bar(
    total=config.steps * config.batch_size,
    unit='tok',
    desc='train',
    initial=start * config.batch_size,
  ) as bar:

    def read(pending):
      done, values = pending
      values = {name: float(v) for name, v in values.items()}
      if not np.isfinite(values['loss']):
        raise FloatingPointError(
          f'loss {values["loss"]} at step {done}: checkpoint of step '
          f'{getattr(checkpointer.latest, "step", "none")} is the last good one'
        )
      if done % config.log_every == 0 or done == config.steps:
        speed = (done - start) * config.batch_size / (time.monotonic() - began)
        writer.write(done, values, {'tokens_per_s': speed})
        bar.set_postfix(
          {n: f'{values[n]:.3g}' for n in ('nmse', 'l0', 'dead_fraction')}
        )
      bar.update(config.batch_size)

    for done, batch_BD in enumerate(batches, start + 1):
      state, values = step_fn(state, _put(batch_BD, mesh))
      # One step behind, so that the device never waits for the host.
      if pending:
        read(pending)
      pending = (done, values)
      last = done == config.steps
      scored = last or (config.eval_every and done % config.eval_every == 0)
      saved = last or checkpointer.should_save(done)
      if scored or saved:
        # The log must not lag behind what resume starts from.
        read(pending)
        pending = None
      if scored:
        found = evaluate(config, mesh, state, data, evaluation).scalars()
        writer.write(done, {f'heldout_{n}': v for n, v in found.items()})
      if saved:
        writer.flush()
        _save(checkpointer, state, done, about)
  return state


def _parts(state: TrainState) -> dict[str, Any]:
  return {
    'sae': state.sae,
    'ema': state.optimizer.ema,
    'adam': state.optimizer.adam,
    'progress': {
      'silent_N': state.silent_N,
      'mse_of_mean': state.mse_of_mean,
      'step': state.step,
    },
  }


def _save(checkpointer, state, step, about):
  checkpointer.save_checkpointables_async(
    step, _parts(state), force=True, custom_metadata=about
  )


def _restore(checkpointer, wanted: TrainState) -> TrainState:
  step = checkpointer.latest.step
  parts = checkpoint.read(checkpointer, step, _parts(wanted))
  return TrainState(
    sae=parts['sae'],
    optimizer=optimizer.OptimizerState(adam=parts['adam'], ema=parts['ema']),
    **parts['progress'],
  )
