"""The activation store: rows of activations and the tokens they come from."""

from sae_jax.store.manifest import Manifest
from sae_jax.store.reader import heldout_contexts, open_store, Store

__all__ = ['Manifest', 'Store', 'heldout_contexts', 'open_store']
