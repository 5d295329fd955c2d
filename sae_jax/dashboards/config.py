"""Options of what is written for the dashboards of others."""

import dataclasses

from sae_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class DashboardConfig(config_lib.Config):
  """What the results are called elsewhere, and how much of a store is read."""

  neuronpedia_model: str = config_lib.option(
    '', 'id of the subject in Neuronpedia; empty for the name of its file'
  )
  neuronpedia_source: str = config_lib.option(
    '',
    'id of the layer and the set in Neuronpedia, such as 5-res; empty for one '
    'after the site, such as 5-resid_post',
  )
  neuronpedia_creator: str = config_lib.option(
    '', 'author of the autoencoder, whom Neuronpedia names'
  )
  delphi_tokens: int = config_lib.option(
    10_000_000,
    "most tokens of the store, the last ones, in delphi's latent cache",
    least=1,
  )
