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
  first, last = data.n_train, data.manifest.n_rows
  last = min(last, first + config.eval_rows)
  size = min(config.batch_size, last - first)
  size -= size % mesh.shape['data']
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
  if config.steps < 1:
    raise config_lib.UserError(f'steps {config.steps} must be at least 1')


def resolve(config: TrainConfig, manifest: store.Manifest) -> TrainConfig:
  """The config with what it leaves to the store: d_model where it is 0."""
  d_model = config.sae.d_model or manifest.d_model
  return dataclasses.replace(
    config, sae=dataclasses.replace(config.sae, d_model=d_model)
  )


def _claim_workdir(config: TrainConfig, workdir: str, identity: str) -> None:
  """Writes the workdir's config, or checks that it is this one."""
  path = epath.Path(workdir) / 'config.json'
  record = {'train_config': dataclasses.asdict(config), 'dataset': identity}
  if path.exists():
    found = config_lib.read_json(path)
    old = config_lib.from_dict(TrainConfig, found['train_config'])
    differing = config_lib.differences(old, config)
    if found['dataset'] != identity:
      differing.append(f'dataset: {found["dataset"]} -> {identity}')
    if differing:
      raise config_lib.UserError(
        f'{workdir} holds a run with another config ({"; ".join(differing)}): '
        'use another workdir, or the same settings to resume'
      )
  elif jax.process_index() == 0:
    files.write_text(path, config_lib.to_json(record))


def train(config: TrainConfig, store_url: str, workdir: str) -> TrainState:
  """Trains an autoencoder, or goes on where a run of the same config stopped.

  The workdir gets config.json, metrics.jsonl, tensorboard/ and checkpoints/.

  Args:
    config: the run.
    store_url: a finished activation store, local path or gs:// URL.
    workdir: local path or gs:// URL; one run each.

  Returns:
    The final state, on the mesh.

  Raises:
    UserError: if config, store, mesh and workdir do not fit.
    FloatingPointError: if the loss is not finite.
  """
  data = store.open_store(store_url)
  config = resolve(config, data.manifest)
  mesh = mesh_lib.make_mesh(config.mesh_data, config.mesh_latent)
  check(config, data.manifest, mesh)
  mesh_lib.log_devices(workdir)
  _claim_workdir(config, workdir, data.manifest.identity)

  with checkpoint.open_checkpointer(
    workdir, config.checkpoint_every, config.checkpoint_keep
  ) as checkpointer:
    if checkpointer.latest is not None:
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
    order = feed.train_order(data, config.seed, config.window_chunks)
    batches = feed.Feed(data, order, config.batch_size).iterate(
      start, config.steps
    )
    writer = metrics.Writer(workdir, start)
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
  parts = checkpointer.load_checkpointables(None, _parts(wanted))
  return TrainState(
    sae=parts['sae'],
    optimizer=optimizer.OptimizerState(adam=parts['adam'], ema=parts['ema']),
    **parts['progress'],
  )
