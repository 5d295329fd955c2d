"""sae-harvest: text -> activations of a language model -> a store."""

from sae_jax.activations import harvest as harvest_lib
from sae_jax.cli import flags


def define() -> None:
  """Defines this binary's flags."""
  flags.define(harvest_lib.HarvestConfig)
  flags.define_url('store', 'where the activations are written')


def work() -> None:
  """Harvests as the flags say."""
  store = flags.url('store')
  manifest = harvest_lib.harvest(flags.read(harvest_lib.HarvestConfig), store)
  print(
    f'{store}: {manifest.n_rows} rows of width {manifest.d_model}, '
    f'{manifest.holdout_rows} held out'
  )


def main() -> None:
  """Entry point of the console script."""
  define()
  flags.run(work, __doc__)


if __name__ == '__main__':
  main()
