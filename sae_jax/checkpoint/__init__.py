"""Checkpoints: what training saves and all that probing needs."""

from sae_jax.checkpoint.bit_sums import fingerprint
from sae_jax.checkpoint.format import (
  Contents,
  Metadata,
  open_checkpointer,
  PROGRESS,
  read,
  read_metadata,
  save,
)
from sae_jax.checkpoint.trained import exists, load, Trained
from sae_jax.checkpoint.verify import look, verify

__all__ = [
  'PROGRESS',
  'Contents',
  'Metadata',
  'Trained',
  'exists',
  'fingerprint',
  'load',
  'look',
  'open_checkpointer',
  'read',
  'read_metadata',
  'save',
  'verify',
]
