"""The feature table, between probing and the browser; see docs/features.md."""

from sae_jax.features.columns import Column, COLUMNS
from sae_jax.features.manifest import Plan
from sae_jax.features.reader import Features, open_features
from sae_jax.features.writer import TableWriter

open = open_features

__all__ = [
  'COLUMNS',
  'Column',
  'Features',
  'Plan',
  'TableWriter',
  'open',
  'open_features',
]
