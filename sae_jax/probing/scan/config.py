"""What the scan is asked for."""

import dataclasses
from typing import Any

from sae_jax.probing.scan import reducers


@dataclasses.dataclass(frozen=True)
class ScanConfig:
  """Sizes of the scan.

  Attributes:
    feature_rows: most rows, from the first on, that statistics, examples and
      codes are of.
    eval_rows: most test rows that metrics are of.
    pca_rows: most training rows that principal components are fitted to; 0 for
      no components.
    batch_rows: rows that are encoded at a time.
    top_examples: examples of each latent with the highest values.
    random_examples: examples of each latent drawn at random.
    near_examples: near misses of each latent with the highest values.
    seed: of the random examples.
    save_every_rows: rows after which the scan is saved.
  """

  feature_rows: int = 1_000_000
  eval_rows: int = 1_000_000
  pca_rows: int = 1_000_000
  batch_rows: int = 4096
  top_examples: int = 16
  random_examples: int = 8
  near_examples: int = 8
  seed: int = 0
  save_every_rows: int = 5_000_000

  def reducers(self) -> dict[str, Any]:
    """The reducers of active latents, by name."""
    kinds = {'statistics': reducers.Statistics()}
    if self.top_examples:
      kinds['top'] = reducers.Top(
        'top', self.top_examples, key='value', group='document'
      )
    if self.random_examples:
      kinds['random'] = reducers.Top(
        'random', self.random_examples, key='random', seed=self.seed
      )
    return kinds

  def near_reducers(self) -> dict[str, Any]:
    """The reducers of near misses, by name."""
    if not self.near_examples:
      return {}
    return {
      'near': reducers.Top(
        'near', self.near_examples, key='value', group='document'
      ),
      'near_count': reducers.Count('near_count'),
    }
