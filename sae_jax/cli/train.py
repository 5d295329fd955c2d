"""sae-train: a store of activations -> a trained autoencoder."""

from sae_jax import train as train_lib
from sae_jax.cli import flags
from sae_jax.step import TrainConfig


def define() -> None:
  """Defines this binary's flags."""
  flags.define(TrainConfig)
  flags.define_url('store', 'a finished store of activations')
  flags.define_url(
    'workdir', 'config, metrics and checkpoints of the run; resumes if it is '
    'there'
  )  # fmt: skip


def work() -> None:
  """Trains as the flags say."""
  train_lib.train(
    flags.read(TrainConfig), flags.url('store'), flags.url('workdir')
  )


def main() -> None:
  """Entry point of the console script."""
  define()
  flags.run(work, __doc__)


if __name__ == '__main__':
  main()
