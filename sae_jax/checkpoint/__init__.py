"""Checkpoints: what training saves and all that probing needs."""

from sae_jax.checkpoint.format import about, open_checkpointer, read
from sae_jax.checkpoint.trained import load, Trained

__all__ = ['Trained', 'about', 'load', 'open_checkpointer', 'read']
