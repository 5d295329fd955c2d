"""The sparse autoencoder: its arrays and pure functions over them.

Every function works on a whole autoencoder or, inside `jax.shard_map` with
`axis` naming the mesh axis of the latents, on one shard of it.
"""

import importlib
from typing import Any

_MODULES = {
  'average': ('averaged', 'corrected', 'sum_of_weights'),
  'encoder': ('has_input_bias', 'input_bias', 'pre_activations', 'products'),
  'initial': (
    'DataStart',
    'data_start',
    'fit_inputs',
    'geometric_median',
    'init_weights',
  ),
  'model': ('decode', 'encode', 'reconstruct'),
  'params': (
    'MATMULS',
    'PREPROCESSING',
    'Sae',
    'SaeConfig',
    'from_dict',
    'to_dict',
    'trained',
    'with_arrays',
  ),
  'preprocessing': (
    'Affine',
    'halves',
    'preprocess',
    'restore',
    'skipped',
    'tokens',
    'way_back',
  ),
  'raw': ('Codes',),
}
_MODULE_OF = {name: m for m, names in _MODULES.items() for name in names}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
  """Imports at first use: who reads a checkpoint needs no kernels."""
  if name in _MODULES:
    return importlib.import_module(f'{__name__}.{name}')
  if name not in _MODULE_OF:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(f'{__name__}.{_MODULE_OF[name]}')
  return getattr(module, name)
