"""This package's side of the comparison: trains, exports and scores.

  python -m experiments.peers.ours --workdir=runs/rows

The workdir is that of `experiments.peers.rows`. Runs warm up over a twentieth
of the steps and then fall linearly to 0, as the other trainers' do; all else is
as in `TrainConfig`, or as --settings says. What is scored is what
`sae_jax.load` gives. A run is deleted once its line is written.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import time
from typing import Any

import jax
import numpy as np

from experiments.peers import files, grid, metric
from experiments.peers import rows as rows_lib
import sae_jax
from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.cli import flags, huge_pages
from sae_jax.training import defaults

TRAINER = 'sae_jax'
# The rates to begin with.
RATES = (2e-3, 4e-3, 8e-3)
RESULTS = 'results'
# How alike the rows' preprocessing must be.
_ALIKE = 1e-5
# What a cell says itself, or what changes no weight.
_OF_CELLS = {
  'n_latents', 'k', 'steps', 'batch_size', 'learning_rate', 'seed',
  'order_seed',
  *config_lib.names_with(sae_jax.TrainConfig, 'may_change'),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OursConfig(config_lib.Config):
  """Which cells, and with which settings."""

  shapes: tuple[str, ...] = config_lib.option(
    grid.SHAPES, 'latents:k:tokens of each shape'
  )
  batch_size: int = config_lib.option(
    grid.BATCH, 'number of tokens in a step', least=1
  )
  seeds: tuple[str, ...] = config_lib.option(
    ('0', '1'), 'seeds of weights and order'
  )
  settings: tuple[str, ...] = config_lib.option(
    (),
    "fields of a run's config in place of the defaults, as name=value",
  )
  label: str = config_lib.option(
    '', 'what tells these cells from others of the same settings'
  )


def run_config(cell: grid.Cell, settings: dict[str, Any]):
  """The `TrainConfig` of a cell.

  Args:
    cell: which.
    settings: values of fields by name, in place of all others.

  Raises:
    UserError: if a value is not allowed.
  """
  warmup = grid.warmup_steps(cell.steps)
  values = {
    'n_latents': cell.n,
    'k': cell.k,
    'steps': cell.steps,
    'batch_size': cell.batch,
    'learning_rate': cell.rate,
    'warmup_steps': warmup,
    'decay_steps': cell.steps - warmup,
    'seed': cell.seed,
    'order_seed': cell.seed,
    'window_chunks': rows_lib.WINDOW_CHUNKS,
    'lanes': rows_lib.LANES,
    # The grid goes on until rates are too high.
    'on_nonfinite': 'skip',
    'log_every': 100,
    'checkpoint_every': 0,
  }
  return config_lib.from_flat(sae_jax.TrainConfig, values | settings)


def parsed(settings: tuple[str, ...]) -> dict[str, Any]:
  """Fields' values from texts such as 'ema_decay=0.99'.

  Raises:
    UserError: if there is no such field, or it has no such value.
  """
  kinds = {f.name: f.type for f in config_lib.leaves(sae_jax.TrainConfig)}
  values = {}
  for text in settings:
    name, _, value = text.partition('=')
    if name not in kinds:
      raise errors.UserError(
        f'a run has no field {name!r} to set: use some of '
        f'{", ".join(sorted(kinds))}'
      )
    try:
      values[name] = (
        {'true': True, 'false': False}[value.lower()]
        if (kinds[name] is bool)
        else kinds[name](value)
      )
    except (KeyError, ValueError) as error:
      raise errors.UserError(
        f'{name} {value!r} is not of the type {kinds[name].__name__}'
      ) from error
  return values


def group(
  config: OursConfig, shape: tuple[int, int, int], workdir: str
) -> grid.Cell:
  """The cell of a shape, without rate and seed.

  Args:
    config: its settings, all other fields of a run and what is left to the run
      become a digest.
    shape: n, k, tokens.
    workdir: of `rows.write`.
  """
  rows = files.digest(workdir)
  cell = grid.Cell(TRAINER, *shape, config.batch_size, 0.0, 0, rows)
  fields = _resolved(run_config(cell, parsed(config.settings)), workdir)
  content = {n: v for n, v in fields.items() if n not in _OF_CELLS}
  text = json.dumps(content | {'label': config.label})
  digest = hashlib.sha256(text.encode()).hexdigest()[:12]
  return dataclasses.replace(cell, settings=digest)


def _resolved(config: sae_jax.TrainConfig, workdir: str) -> dict[str, Any]:
  """All fields of a run, with a value for what is left to the run."""
  n_train = files.counts(workdir)['train']
  sample_rows = min(config.sample_rows, n_train)
  return config_lib.flat(defaults.resolve(config, sample_rows))


def export(trained: sae_jax.Trained, sample_BD: np.ndarray) -> metric.Arrays:
  """An autoencoder as arrays in the units of the rows.

  Args:
    trained: the autoencoder.
    sample_BD: some rows, all of which its preprocessing must map alike.

  Raises:
    UserError: if it is not a TopK autoencoder, or maps rows differently.
  """
  if trained.config.activation != 'topk':
    raise errors.UserError(
      f'activation {trained.config.activation} is not compared: use topk'
    )
  if trained.config.preprocessing == 'layer_norm':
    raise errors.UserError(
      'preprocessing layer_norm is not compared: its epsilon is not on the way '
      'back, so that one map does not do for both; use center_unit_norm'
    )
  affine = trained.encode(sample_BD).affine
  shift, scale = (np.float64(part) for part in (affine.shift, affine.scale))
  apart = np.ptp(shift + 0 * sample_BD, 0).max(), np.ptp(scale) / scale.mean()
  if max(apart) > _ALIKE:
    raise errors.UserError(
      f'preprocessing {trained.config.preprocessing} maps rows differently, by '
      f'{max(apart):.2g}: use one under which rows of unit norm are alike'
    )
  # x = (row - shift) / scale, and codes are linear in it.
  shift_D, scale = shift.mean(0), scale.mean()
  sae = {
    name: np.float64(getattr(trained.sae, name))
    for name in ('w_enc_ND', 'b_lat_N', 'w_dec_ND', 'b_pre_D')
  }
  return metric.Arrays(
    sae['w_enc_ND'],
    scale * sae['b_lat_N'],
    sae['w_dec_ND'],
    shift_D + scale * sae['b_pre_D'],
    trained.config.k,
  )


def scores(
  cell: grid.Cell, trained: sae_jax.Trained, workdir: str
) -> dict[str, Any]:
  """The figures of a cell's line.

  Raises:
    UserError: see `export`.
    ValueError: if the arrays don't reconstruct as the autoencoder does.
  """
  test = files.rows(workdir, 'test')
  sample_BD = np.array(test[: metric.CHECKED_ROWS])
  arrays = export(trained, sample_BD)
  passes = functools.partial(metric.forward, arrays)
  result = {}
  for split in ('validation', 'test'):
    blocks = metric.blocks(files.rows(workdir, split), cell.n)
    figures = metric.score(blocks, passes)
    result |= {f'{split}_{name}': value for name, value in figures.items()}
  order = files.order(workdir, cell.seed, cell.steps * cell.batch)
  train = files.rows(workdir, 'train')
  blocks = metric.blocks(train, cell.n, np.unique(order))
  result['train_silent'] = metric.silent_share(blocks, passes)
  # A GPU would take another precision.
  with jax.default_matmul_precision('highest'):
    own_BD = trained.reconstruct(sample_BD)
  error = metric.check(arrays, sample_BD, own_BD, figures['fvu'])
  return result | {'forward_error': error}


def run(config: OursConfig, workdir: str) -> None:
  """Runs all cells that are still to be run.

  Args:
    config: which.
    workdir: of `rows.write`; lines are added to results/ours.jsonl in it.

  Raises:
    UserError: if a setting is not allowed, or a run was stopped.
  """
  seeds = tuple(map(int, config.seeds))
  results = grid.read(os.path.join(workdir, RESULTS))
  for shape in grid.shapes(config.shapes):
    of_shape = group(config, shape, workdir)
    while cells := grid.wanted(of_shape, RATES, seeds, results):
      # Runs of one order share its batches, and the compiled step.
      cells = [cell for cell in cells if cell.seed == cells[0].seed]
      results |= _run_together(config, cells, workdir)


def _run_together(config, cells, workdir) -> grid.Results:
  """Trains cells on the same batches; their lines are written."""
  settings = parsed(config.settings)
  configs = {
    os.path.join(workdir, 'runs', _name(cell)): run_config(cell, settings)
    for cell in cells
  }
  began = time.monotonic()
  sae_jax.train_many(configs, os.path.join(workdir, 'store'))
  seconds = (time.monotonic() - began) / len(cells)
  results = {}
  for cell, folder in zip(cells, configs):
    trained = sae_jax.load(folder)
    if trained.step < cell.steps:
      raise errors.UserError(
        f'{folder} was stopped before step {cell.steps}: run it again to go on'
      )
    results[cell] = {
      'version': sae_jax.__version__,
      'device': jax.devices()[0].device_kind,
      'train_seconds': round(seconds, 2),
      'config': _resolved(configs[folder], workdir),
      'label': config.label,
      **scores(cell, trained, workdir),
    }
    path = os.path.join(workdir, RESULTS, 'ours.jsonl')
    grid.append(path, cell, results[cell])
    shutil.rmtree(folder)
    print(grid.line(cell, results[cell]), flush=True)
  return results


def _name(cell: grid.Cell) -> str:
  return (
    f'{cell.settings}_n{cell.n}_k{cell.k}_t{cell.tokens}_b{cell.batch}_'
    f'rate{cell.rate:g}_seed{cell.seed}'
  )


def main() -> None:
  """Entry point."""
  flags.define(OursConfig)
  flags.define_url('workdir', 'folder of experiments.peers.rows')
  flags.run(lambda: run(flags.read(OursConfig), flags.url('workdir')), __doc__)


if __name__ == '__main__':
  huge_pages.use_huge_pages()
  main()
