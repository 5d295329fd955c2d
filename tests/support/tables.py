"""Feature tables of `probed`, made as sae-probe makes them."""

import dataclasses

from sae_jax import features as features_lib
from sae_jax import mesh as mesh_lib
from sae_jax.probing import report, table
from sae_jax.probing.scan.run import scan
from tests.support import probed


def build(trained, data, folder, features, batch_rows=50, seed=0, mesh=None):
  """The sealed table of a store's rows, opened."""
  config = report.ProbeConfig(
    features=features, batch_rows=batch_rows, seed=seed
  )
  mesh = mesh or mesh_lib.one_device()
  result = scan(report.scan_config(config), trained, data, folder, mesh)
  url = f'{folder}/features'
  writer = table.fill(
    features,
    trained,
    probed.make_subject(),
    data,
    result,
    url,
    f'{folder}/scratch',
    seed,
  )
  writer.seal({'config': dataclasses.asdict(config)})
  return features_lib.open(url, probed.VOCABULARY)
