"""Training: from a store and a config to a finished run, or its next part."""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
from typing import Any

from etils import epath
import jax
from jax.sharding import Mesh

from sae_jax import config as config_lib
from sae_jax import errors, store
from sae_jax import mesh as mesh_lib
from sae_jax.feed import batches as batches_lib
from sae_jax.feed import from_store, from_text
from sae_jax.storage import files
from sae_jax.training import defaults, evaluation, given, loop, memory, resume
from sae_jax.training import run as run_lib
from sae_jax.training.config import check_mesh, TrainConfig
from sae_jax.training.state import TrainState


def check(config: TrainConfig, data: store.Store, mesh: Mesh) -> None:
  """Raises UserError if config, store and mesh do not fit each other."""
  manifest = data.manifest
  given.check(config, data)
  if config.sae.d_model != manifest.d_model:
    raise errors.UserError(
      f'd_model {config.sae.d_model} is not the width {manifest.d_model} of '
      f'the store: use --d_model={manifest.d_model}, or 0 to take the '
      "store's"
    )
  check_mesh(config, mesh)
  if evaluation.span(config, data, mesh)[2] < 2:
    raise errors.UserError(
      f'the store has {len(data.validation_rows)} validation rows, of '
      f'{manifest.holdout_rows} held out; an evaluation needs '
      f'{max(2, mesh.shape["data"])}: harvest with a larger holdout_fraction'
    )


def resolve(config: TrainConfig, manifest: store.Manifest) -> TrainConfig:
  """The config with values for all that is left to the store and the run.

  Args:
    config: from `given.with_its_settings`.
    manifest: of the store.
  """
  d_model = config.sae.d_model or manifest.d_model
  config = dataclasses.replace(
    config, sae=dataclasses.replace(config.sae, d_model=d_model)
  )
  n_train = manifest.n_rows - manifest.holdout_rows
  return defaults.resolve(config, min(config.sample_rows, n_train))


def sweep(
  config: TrainConfig, workdir: str, **values: Sequence[Any]
) -> dict[str, TrainConfig]:
  """Runs for every combination of some fields' values.

  Args:
    config: the settings that the runs have in common.
    workdir: local path or URL; each run gets a folder in it that is
      named after its values.
    **values: values of fields of the config, nested ones included, by name.

  Returns:
    The configs by workdir, for `train_many`.

  Raises:
    UserError: if there is no such field.
  """
  configs = {}
  for changes, whole in config_lib.combinations(config, values):
    name = '_'.join(
      f'{field}={config_lib.in_a_name(value)}'
      for field, value in changes.items()
    )
    path = str(epath.Path(workdir) / name) if name else workdir
    configs[path] = config_lib.from_flat(TrainConfig, whole)
  return configs


def train(config: TrainConfig, store_url: str, workdir: str) -> TrainState:
  """Trains an autoencoder, or goes on where a run of the same config stopped.

  The workdir gets config.json, metrics.jsonl, tensorboard/ and checkpoints/.
  On SIGTERM the run is saved and this returns before the last step.

  Between a run and its resumption only these may change: the devices, what is
  logged, how often it is saved, and the number of steps if the rate does not
  decay.

  Args:
    config: the run.
    store_url: a finished activation store, local path or URL.
    workdir: local path or URL; one run each.

  Returns:
    The final state, on the mesh.

  Raises:
    UserError: if config, store, mesh and workdir do not fit, or the latest
      checkpoint is damaged.
    FloatingPointError: if a loss or gradient is not finite.
  """
  return train_many({workdir: config}, store_url)[workdir]


def train_many(
  configs: Mapping[str, TrainConfig], store_url: str
) -> dict[str, TrainState]:
  """Trains many autoencoders on the same batches, each batch in turn.

  Each result equals that of `train` with its config, to the bit, and each
  workdir can be resumed alone. All states are in memory at once. Runs that
  differ only in seed and learning rate share one compiled step.

  Args:
    configs: by workdir; batch size, order and mesh are the same in all.
    store_url: see `train`.

  Returns:
    The final states by workdir.

  Raises:
    UserError: see `train`; also if runs cannot share batches.
    FloatingPointError: see `train`.
  """
  # 1. Runs on one reading of the data must agree on it: store, order, batch
  #    size and mesh. Nothing is opened where they do not.
  # 2. The store is opened, and every config checked against it and the mesh
  #    before any workdir is touched.
  # 3. Each workdir is claimed: a second process on it ends here. Its run
  #    resumes from the latest checkpoint, if that is of the same config; where
  #    there is none the state is fresh. A run that is finished is left alone.
  # 4. Batches begin where the run begins that has done the fewest steps. The
  #    others wait until it has caught up.
  # 5. config.json is written, the log is cut back to the step the run goes on
  #    from, and all runs train, log, evaluate and save until the last has
  #    finished, or SIGTERM has had them saved.
  # 6. However this ends, logs are closed, then saves waited for, then workdirs
  #    given up.
  configs = {w: given.with_its_settings(c) for w, c in configs.items()}
  _check_shared(configs)
  first = next(iter(configs.values()))
  data = store.open_store(
    store_url,
    first.site,
    first.store_version or None,
    target_site=first.sae.target_site,
  )
  for config in configs.values():
    defaults.warn_unmeasured(config)
  configs = {w: resolve(c, data.manifest) for w, c in configs.items()}
  first = next(iter(configs.values()))
  mesh = mesh_lib.make_mesh(first.mesh_data, first.mesh_latent)
  for config in configs.values():
    check(config, data, mesh)
  memory.check(list(configs.values()), mesh)
  with contextlib.ExitStack() as stack:
    starts = [
      resume.start(config, workdir, mesh, data, stack)
      for workdir, config in configs.items()
    ]
    states = {start.workdir: start.state for start in starts}
    unfinished = [start for start in starts if not start.finished]
    if unfinished:
      scored = max(
        (start.config for start in unfinished), key=lambda c: c.eval_rows
      )
      evaluation.check_rows(scored, data, mesh)
      least = min(unfinished, key=lambda start: int(start.state.step))
      batches = _batches(first, data, mesh, least.cursor)
      runs = [_run(start, mesh, data, batches, stack) for start in unfinished]
      loop.run_all(runs, batches)
      states |= {run.workdir: run.state for run in runs}
  return states


def _check_shared(configs: Mapping[str, TrainConfig]) -> None:
  """Raises UserError if runs cannot share batches."""
  flat = list(map(config_lib.flat, configs.values()))
  for name in config_lib.names_with(TrainConfig, 'shared'):
    values = {values[name] for values in flat}
    if len(values) > 1:
      raise errors.UserError(
        f'{name} differs between runs on the same batches '
        f'({", ".join(map(str, sorted(values)))}): train those apart'
      )


def _run(start, mesh, data, batches, stack) -> run_lib.Run:
  """A run that writes its config and its log; the stack closes it."""
  if jax.process_index() == 0:
    files.write_text(
      epath.Path(start.workdir) / 'config.json',
      config_lib.to_json(start.config),
    )
  run = run_lib.Run(
    start.config,
    start.workdir,
    mesh,
    start.state,
    data,
    batches,
    start.saver,
  )
  stack.callback(run.close)
  return run


def _batches(config, data, mesh, cursor) -> batches_lib.Batches:
  """The batches that runs of this config are trained on."""
  if config.stream:
    return from_text.TextFeed(
      data,
      config.batch_size,
      config.order_seed,
      config.window_chunks,
      mesh,
      cursor,
      workers=config.tokenizer_workers,
      moved_to=config.subject,
    )
  lanes = config.lanes or from_store.lanes_for(data, config.batch_size)
  order = from_store.train_order(
    data, config.order_seed, config.window_chunks, lanes
  )
  return from_store.StoreFeed(data, order, config.batch_size, mesh)
