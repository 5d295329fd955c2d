"""Checkpoints: what training saves and all that probing needs."""

from sae_jax.checkpoint.format import (
  Contents,
  Metadata,
  open_checkpointer,
  PROGRESS,
  read,
  read_metadata,
  save,
)
from sae_jax.checkpoint.trained import load, Trained

__all__ = [
  'PROGRESS',
  'Contents',
  'Metadata',
  'Trained',
  'load',
  'open_checkpointer',
  'read',
  'read_metadata',
  'save',
]
