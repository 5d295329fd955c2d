"""sae-harvest: text -> activations of a language model -> a store."""

from absl import flags as absl_flags

from sae_jax import store as store_lib
from sae_jax.cli import flags
from sae_jax.harvesting import harvest as harvest_lib
from sae_jax.harvesting.config import HarvestConfig
from sae_jax.store import layout


def define() -> None:
  """Defines this binary's flags."""
  flags.define(HarvestConfig)
  flags.define_url('store', 'folder to which the activations are written')
  flags.define_integer(
    'process_index',
    0,
    'number of this process, from 0, if several processes harvest one store',
  )
  flags.define_integer(
    'process_count',
    1,
    'number of processes that harvest one store, each of which writes its '
    'share of the shards',
  )
  absl_flags.DEFINE_bool(
    'verify',
    False,
    'harvest nothing: check every byte of a finished store and name damaged '
    'files',
  )


def work() -> None:
  """Harvests as the flags say."""
  store, values = flags.url('store'), absl_flags.FLAGS
  if values.verify:
    manifest = layout.read_manifest(store)
    opened = store_lib.open_store(store, manifest.sites[0] if manifest else '')
    print(f'{store}: {opened.verify():,} bytes are what was written')
    return
  manifest = harvest_lib.harvest(
    flags.read(HarvestConfig),
    store,
    process=(values.process_index, values.process_count),
  )
  if manifest is None:
    print(f'{store}: not sealed yet, other processes have shards to make')
    return
  print(
    f'{store}: {manifest.n_rows} rows of width {manifest.d_model}, '
    f'{manifest.holdout_rows} held out'
  )
