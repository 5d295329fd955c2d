"""sae-sweep: many runs over a grid, by any number of workers.

Each worker is the same command. What one that is stopped or lost leaves, the
others do, or the same command again.
"""

from collections.abc import Mapping, Sequence
import sys
from typing import Any

from absl import flags as absl_flags

from sae_jax import errors, mesh
from sae_jax.cli import flags, slice_flags
from sae_jax.plan import sweep as sweep_lib
from sae_jax.plan import sweep_table
from sae_jax.sweeps import cells as cells_lib
from sae_jax.sweeps import grid as grid_lib
from sae_jax.sweeps import planned
from sae_jax.sweeps import work as work_lib
from sae_jax.training import preemption
from sae_jax.training.config import TrainConfig

# What reads the values of axes that are no fields of a run.
_OTHERS = {grid_lib.TOKENS: flags.integer, grid_lib.RATE_FACTOR: float}


def define() -> None:
  """Defines this binary's flags."""
  flags.define(TrainConfig)
  flags.define(work_lib.WorkConfig)
  flags.define_processes()
  absl_flags.DEFINE_multi_string(
    'grid',
    [],
    'a field of a run and its values, such as k=16,32; also tokens, in place '
    'of steps, and rate_factor, of the learning rate that the rule has. There '
    'is a run for each combination',
  )
  absl_flags.DEFINE_list(
    'store',
    [],
    'finished stores of activations to train on, separated by commas; each has '
    'all runs. A plan for a --topology needs none: then give --d_model',
  )
  absl_flags.DEFINE_float(
    'converge',
    0.0,
    'share of the loss on validation rows, such as 0.002: a run ends when its '
    'loss falls by less while its steps grow by the root of 2, or after all '
    'its steps; 0 for all steps',
    lower_bound=0.0,
    upper_bound=0.5,
  )
  absl_flags.DEFINE_bool(
    'plan',
    False,
    'train nothing: print the runs, which share a reading, their operations, '
    'and how long they would take: here, by the time of a few steps, or on the '
    'TPUs of --topology, by their compiler and arithmetic',
  )
  slice_flags.define(
    'with --plan alone', 'those of which each n_latents takes the fastest'
  )
  flags.define_integer(
    'most_meshes',
    1,
    'most meshes that --mesh=auto chooses for --topology; runs on different '
    'meshes are different commands',
  )
  absl_flags.DEFINE_bool(
    'every_shape',
    False,
    'compile the step of every number of latents and of active ones for '
    '--topology, not of the least and greatest alone',
  )
  flags.define_url(
    'workdir',
    'folder of the sweep; runs that are done there are not done again. A plan '
    'for a --topology needs none',
    required=False,
  )


def work() -> None:
  """Does runs of the sweep as the flags say."""
  values = absl_flags.FLAGS
  axes = flags.values_of(values.grid, 'grid', _OTHERS)
  if values.topology:
    _plan_for_slices(axes)
    return
  workdir = flags.url('workdir')
  mesh.start_processes(
    values.coordinator, values.num_processes, values.process_id
  )
  preemption.joined()
  cells = grid_lib.grid(_config(), flags.urls('store'), axes, values.converge)
  options = flags.read(work_lib.WorkConfig)
  if values.plan:
    print(planned.text(options, cells, workdir))
    return
  left = work_lib.work(options, cells, workdir)
  preemption.trained()
  print(
    f'{workdir}: {len(cells) - left} of {len(cells)} runs are done'
    + (', the same command goes on' if left else '')
  )


def _config() -> TrainConfig:
  config = flags.read(TrainConfig)
  if config.profile_steps:
    raise errors.UserError('sae-sweep profiles no run: use sae-train')
  return config


def _plan_for_slices(axes: Mapping[str, Sequence[Any]]) -> None:
  """Prints what the runs that are left would take of a TPU slice."""
  values = absl_flags.FLAGS
  if not values.plan:
    raise errors.UserError(
      f'topology {values.topology!r} is what --plan is for: add --plan, or '
      'leave --topology out'
    )
  slice_flags.prepare()
  if values.store:
    cells = grid_lib.grid(_config(), flags.urls('store'), axes, values.converge)
  else:
    cells = grid_lib.without_store(_config(), axes)
  if values.store and values.workdir:
    done = cells_lib.finished(flags.url('workdir'))
    cells = [cell for cell in cells if cell.name not in done]
  if not cells:
    print('all runs are done')
    return
  plan = sweep_lib.plan(
    cells,
    values.topology,
    values.num_slices,
    slice_flags.mesh(),
    case=values.dead,
    most_meshes=values.most_meshes,
    runs_at_a_time=flags.read(work_lib.WorkConfig).runs_at_a_time,
    every_shape=values.every_shape,
    price_per_chip_hour=values.price_per_chip_hour,
    report=lambda line: print(line, file=sys.stderr, flush=True),
  )
  for line in sweep_table.lines(plan):
    print(line)
  slice_flags.write_json(plan.to_dict())
