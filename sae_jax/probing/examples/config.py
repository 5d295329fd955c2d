"""The size of the feature table."""

import dataclasses

from sae_jax import config as config_lib

# A table with so many of a thing for each latent is beyond what a page shows.
_MOST = 10_000


@dataclasses.dataclass(frozen=True)
class FeatureConfig(config_lib.Config):
  """The size of the feature table."""

  feature_rows: int = config_lib.option(
    1_000_000,
    "most rows of the store from which latents' examples and statistics are "
    'taken',
    least=1,
  )
  top_examples: int = config_lib.option(
    16,
    'number of examples of each latent with its highest activations, at most '
    'one per document',
    least=1,
    most=_MOST,
  )
  random_examples: int = config_lib.option(
    8,
    'number of examples of each latent drawn at random among its positive '
    'activations',
    least=1,
    most=_MOST,
  )
  window_before: int = config_lib.option(
    24,
    'number of tokens shown before the token of an example',
    least=0,
    most=_MOST,
  )
  window_after: int = config_lib.option(
    8,
    'number of tokens shown after the token of an example',
    least=0,
    most=_MOST,
  )
  votes: int = config_lib.option(
    10,
    'number of tokens listed whose logits each latent raises most, and as many'
    ' that it lowers most; 0 to leave them out',
    least=0,
    most=_MOST,
  )
  neighbours: int = config_lib.option(
    5,
    'number of latents listed as nearest to each latent, by the cosine of '
    'decoder rows; 0 to leave them out, since all pairs of latents are '
    'compared',
    least=0,
    most=_MOST,
  )
  near_examples: int = config_lib.option(
    8,
    'number of near misses of each latent with the highest values, at most one '
    'per document: tokens on which it is next in order after the k active ones',
    least=1,
    most=_MOST,
  )
  decile_examples: int = config_lib.option(
    1,
    'number of examples of each latent drawn at random from each tenth of its '
    'positive activations',
    least=1,
    most=_MOST,
  )
  firing_tokens: int = config_lib.option(
    10,
    'number of tokens listed on which each latent fires most often',
    least=1,
    most=_MOST,
  )
  partners: int = config_lib.option(
    5,
    'number of latents listed that fire together with each latent most often '
    'for how often they fire, by the phi coefficient',
    least=1,
    most=_MOST,
  )
