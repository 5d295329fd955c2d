"""The activation store: rows of activations and the tokens they come from."""

from sae_jax.store.contexts import test_contexts, training_contexts
from sae_jax.store.manifest import Manifest
from sae_jax.store.reader import open_store, Store
from sae_jax.store.text import Text

__all__ = [
  'Manifest',
  'Store',
  'Text',
  'open_store',
  'test_contexts',
  'training_contexts',
]
