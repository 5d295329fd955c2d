"""The TopK sparse autoencoder: its arrays and pure functions over them.

Every function works on a whole autoencoder or, inside `jax.shard_map` with
`axis` naming the mesh axis of the latents, on one shard of it.
"""

from sae_jax.autoencoder.initial import (
  fit_inputs,
  geometric_median,
  init_weights,
)
from sae_jax.autoencoder.model import (
  candidates,
  decode,
  encode,
  pre_activations,
  reconstruct,
  select,
)
from sae_jax.autoencoder.params import (
  MATMULS,
  PREPROCESSING,
  Sae,
  SaeConfig,
  trained,
)
from sae_jax.autoencoder.preprocessing import Affine, preprocess, restore

__all__ = [
  'MATMULS',
  'PREPROCESSING',
  'Affine',
  'Sae',
  'SaeConfig',
  'candidates',
  'decode',
  'encode',
  'fit_inputs',
  'geometric_median',
  'init_weights',
  'pre_activations',
  'preprocess',
  'reconstruct',
  'restore',
  'select',
  'trained',
]
