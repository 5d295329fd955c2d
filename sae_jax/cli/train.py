"""sae-train: a store of activations -> a trained autoencoder."""

from absl import flags as absl_flags

from sae_jax import mesh
from sae_jax import train as train_lib
from sae_jax.cli import flags
from sae_jax.step import TrainConfig


def define() -> None:
  """Defines this binary's flags."""
  flags.define(TrainConfig)
  _define_processes()
  flags.define_url('store', 'a finished store of activations')
  flags.define_url(
    'workdir', 'config, metrics and checkpoints of the run; resumes if it is '
    'there'
  )  # fmt: skip


def _define_processes() -> None:
  flags.show(
    absl_flags.DEFINE_string(
      'coordinator',
      '',
      "of a run on many hosts: 'auto' on a TPU slice, or the first process's "
      'host:port',
    )
  )
  flags.show(
    absl_flags.DEFINE_integer(
      'num_processes', 0, 'with --coordinator=host:port'
    )
  )
  flags.show(
    absl_flags.DEFINE_integer('process_id', -1, 'with --coordinator=host:port')
  )


def work() -> None:
  """Trains as the flags say."""
  values = absl_flags.FLAGS
  mesh.start_processes(
    values.coordinator, values.num_processes, values.process_id
  )
  workdir = flags.url('workdir')
  state = train_lib.train(flags.read(TrainConfig), flags.url('store'), workdir)
  print(f'{workdir}: trained to step {int(state.step)}')


def main() -> None:
  """Entry point of the console script."""
  define()
  flags.run(work, __doc__)


if __name__ == '__main__':
  main()
