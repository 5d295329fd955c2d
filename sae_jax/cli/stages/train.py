"""sae-train: a store of activations -> a trained autoencoder."""

import dataclasses
import signal

from absl import flags as absl_flags
import jax

from sae_jax import checkpoint, errors, mesh
from sae_jax.cli import flags
from sae_jax.training import preemption
from sae_jax.training import train as train_lib
from sae_jax.training.config import TrainConfig


def define() -> None:
  """Defines this binary's flags."""
  flags.define(TrainConfig)
  flags.define_processes()
  absl_flags.DEFINE_multi_string(
    'sweep',
    [],
    'a field and its values: trains one run for each combination of the '
    'values, all on one reading of the data, each in a folder of the workdir. '
    '--sweep=k=16,32 --sweep=seed=0,1 trains four runs',
  )
  absl_flags.DEFINE_bool(
    'debug_nans', False, 'stop at the operation that produces a NaN; slow'
  )
  absl_flags.DEFINE_bool(
    'verify',
    False,
    'read every array of the checkpoints in the workdir, compare it with its '
    'checksums, print a line each, and train nothing; needs no --store',
  )
  flags.define_url(
    'store', 'finished store of activations to train on', required=False
  )
  flags.define_url(
    'workdir',
    'folder for the config, metrics and checkpoints of the run; a run that is '
    'there is resumed',
  )


def _verify(workdir: str) -> None:
  """Prints a line for each array of a workdir's checkpoints.

  Raises:
    UserError: if one is damaged.
  """
  # What was not read is not known to be sound: no exit code of 0.
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  damaged = 0
  for report in checkpoint.verify(workdir):
    damaged += not report.sound
    print(f'{report.place}: {report.text}')
  if damaged:
    raise errors.UserError(
      f'{damaged} of the lines above name damage: delete the folder of such a '
      'step, and the same command goes on from the checkpoint before it'
    )


def work() -> None:
  """Trains as the flags say."""
  values = absl_flags.FLAGS
  if values.verify:
    _verify(flags.url('workdir'))
    return
  mesh.start_processes(
    values.coordinator, values.num_processes, values.process_id
  )
  preemption.joined()
  jax.config.update('jax_debug_nans', values.debug_nans)
  config = flags.read(TrainConfig)
  if config.from_checkpoint:
    begun = flags.url('from_checkpoint')
    config = dataclasses.replace(config, from_checkpoint=begun)
  configs = train_lib.sweep(
    config,
    flags.url('workdir'),
    **flags.values_of(values.sweep, 'sweep'),
  )
  states = train_lib.train_many(configs, flags.url('store'))
  preemption.trained()
  for workdir, state in states.items():
    step = int(state.step)
    left = configs[workdir].steps - step
    print(
      f'{workdir}: stopped by SIGTERM and saved after step {step}, the same '
      f'command does the {left} that are left'
      if left > 0
      else f'{workdir}: trained to step {step}'
    )
