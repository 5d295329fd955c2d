"""sae-sweep: many runs over a grid, by any number of workers.

Each worker is the same command. What one that is stopped or lost leaves, the
others do, or the same command again.
"""

from absl import flags as absl_flags

from sae_jax import errors, mesh
from sae_jax.cli import flags
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
    'all runs',
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
    'and how long they would take here by the time of a few steps',
  )
  flags.define_url(
    'workdir',
    'folder of the sweep; runs that are done there are not done again',
  )


def work() -> None:
  """Does runs of the sweep as the flags say."""
  values = absl_flags.FLAGS
  mesh.start_processes(
    values.coordinator, values.num_processes, values.process_id
  )
  preemption.joined()
  workdir = flags.url('workdir')
  config = flags.read(TrainConfig)
  if config.profile_steps:
    raise errors.UserError('sae-sweep profiles no run: use sae-train')
  cells = grid_lib.grid(
    config,
    flags.urls('store'),
    flags.values_of(values.grid, 'grid', _OTHERS),
    values.converge,
  )
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
