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
from sae_jax.checkpoint.trained import exists, load, opened, Saved, Trained
from sae_jax.checkpoint.verify import look, verify

__all__ = [
  'PROGRESS',
  'Contents',
  'Metadata',
  'Saved',
  'Trained',
  'exists',
  'fingerprint',
  'load',
  'look',
  'open_checkpointer',
  'opened',
  'read',
  'read_metadata',
  'save',
  'verify',
]
