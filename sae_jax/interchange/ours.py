"""Our autoencoders in the terms in which those of others are described.

Preprocessing that no format has is folded into the weights:

  dataset, (x - m) / s        none: encoder by 1 / s, decoder and b_pre by s,
                              and m added to the decoder's bias
  center_unit_norm            layer_norm, which is sqrt(D - 1) times that but
                              for its 1e-5 beside the standard deviation:
                              encoder by 1 / sqrt(D - 1), decoder and b_pre by
                              sqrt(D - 1)
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from sae_jax import autoencoder, errors
from sae_jax.autoencoder.nonlinearity import jumprelu
from sae_jax.checkpoint import Saved
from sae_jax.interchange import folding
from sae_jax.interchange.imported import Imported, Provenance, Semantics
from sae_jax.storage import tensors as tensors_lib

_NORMALISATIONS = {
  'none': 'none',
  'dataset': 'none',
  'center_unit_norm': 'layer_norm',
  'layer_norm': 'layer_norm',
  'unit_rms': 'constant_norm_rescale',
}
_OF_TOKEN = ('center_unit_norm', 'layer_norm', 'unit_rms')
_WITH_K = ('topk', 'groupmax', 'batchtopk')


def described(saved: Saved, url: str) -> Imported:
  """An autoencoder of ours as one of another library would be described.

  Args:
    saved: the autoencoder.
    url: where it is from.

  Raises:
    UserError: if no terms of others say what it is.
  """
  config, sae = saved.config, saved.sae
  if config.target_site and config.preprocessing in _OF_TOKEN:
    raise errors.UserError(
      f'{url} reads tokens at their own scale (preprocessing '
      f'{config.preprocessing}) and writes at another one, which no format of '
      'others can say: train with --preprocessing=dataset or none'
    )
  gated = config.activation == 'gated'
  arrays = _folded(config, sae)
  arrays['b_gate_N' if gated else 'b_enc_N'] = arrays.pop('b_lat_N')
  threshold = None
  if gated:
    arrays |= sae.extra
  elif config.activation == 'jumprelu':
    extra = {name: jnp.asarray(t.read()) for name, t in sae.extra.items()}
    arrays['threshold_N'] = _array(np.asarray(jumprelu.thresholds(extra)))
  elif config.activation == 'batchtopk':
    threshold = float(sae.extra['threshold'].read())
  return Imported(
    format='sae_jax',
    url=url,
    d_in=config.d_model,
    d_out=config.d_model,
    n_latents=config.n_latents,
    tensors=arrays,
    transposed=frozenset(),
    extra={},
    semantics=Semantics(
      nonlinearity=config.activation,
      k=config.k if config.activation in _WITH_K else None,
      threshold=threshold,
      normalisation=_NORMALISATIONS[config.preprocessing],
      subtract_b_dec=autoencoder.has_input_bias(config),
    ),
    provenance=_provenance(saved),
  )


def _provenance(saved: Saved) -> Provenance:
  about = saved.metadata.dataset if saved.metadata else {}
  config = about.get('config') or {}
  return Provenance(
    model=about.get('subject'),
    site=about.get('site'),
    target_site=saved.config.target_site or None,
    context_size=config.get('context_length'),
    prepend_bos=bool(about.get('bos')) if about else None,
    settings=dataclasses.asdict(saved.config),
  )


def _folded(
  config: autoencoder.SaeConfig, sae: autoencoder.Sae
) -> dict[str, tensors_lib.Tensor]:
  """The weights by common name, with what no format has folded in."""
  d_model = config.d_model
  mean_D, scale = np.zeros(d_model), 1.0
  if config.preprocessing == 'dataset':
    mean_D = _f64(sae.data_mean_D)
    scale = float(sae.data_scale.read())
  elif config.preprocessing == 'center_unit_norm':
    # Of the layer-normalised token, which is what a format's weights read.
    scale = math.sqrt(d_model - 1)
  out_mean_D, out_scale = mean_D, scale
  if config.target_site:
    out_mean_D = _f64(sae.target['target_mean_D'])
    out_scale = float(sae.target['target_scale'].read())
  b_dec_D = out_scale * _f64(sae.b_pre_D) + out_mean_D
  arrays = {
    'w_enc_ND': _times(sae.w_enc_ND, 1 / scale),
    'w_dec_ND': _times(sae.w_dec_ND, out_scale),
    'b_lat_N': sae.b_lat_N,
  }
  if not autoencoder.has_input_bias(config) and mean_D.any():
    # W (x - m) / s + b: the mean's part of it is a bias.
    arrays['b_lat_N'] = _array(
      _f64(sae.b_lat_N) - _product(sae.w_enc_ND, mean_D / scale)
    )
  if config.skip:
    skip_DD = _f64(sae.target['w_skip_DD']) * (out_scale / scale)
    b_dec_D = b_dec_D - mean_D @ skip_DD
    arrays['w_skip_DD'] = _array(skip_DD.T)
  return arrays | {'b_dec_D': _array(b_dec_D)}


def _product(matrix_ND: tensors_lib.Tensor, vector_D: np.ndarray) -> np.ndarray:
  """A matrix times a vector, a block of rows at a time."""
  blocks = matrix_ND.blocks()
  return np.concatenate([rows.astype(np.float64) @ vector_D for rows in blocks])


def _times(matrix_ND: tensors_lib.Tensor, factor: float) -> tensors_lib.Tensor:
  if factor == 1:
    return matrix_ND
  return folding.times(matrix_ND, np.full(matrix_ND.shape[0], factor))


def _f64(tensor: tensors_lib.Tensor) -> np.ndarray:
  return tensor.read().astype(np.float64)


def _array(array: np.ndarray) -> tensors_lib.Tensor:
  return tensors_lib.from_array(np.asarray(array, np.float32))
