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

import jax
import numpy as np

from sae_jax import autoencoder, errors
from sae_jax.autoencoder.nonlinearity import jumprelu
from sae_jax.checkpoint import Trained
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


def described(trained: Trained, url: str) -> Imported:
  """An autoencoder of ours as one of another library would be described.

  Args:
    trained: the autoencoder, its arrays on this process.
    url: where it is from.

  Raises:
    UserError: if no terms of others say what it is.
  """
  config, sae = trained.config, trained.sae
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
    arrays |= {name: _whole(array) for name, array in sae.extra.items()}
  elif config.activation == 'jumprelu':
    arrays['threshold_N'] = _whole(jumprelu.thresholds(sae.extra))
  elif config.activation == 'batchtopk':
    threshold = float(sae.extra['threshold'])
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
    provenance=_provenance(trained),
  )


def _provenance(trained: Trained) -> Provenance:
  about = trained.metadata.dataset if trained.metadata else {}
  config = about.get('config') or {}
  return Provenance(
    model=about.get('subject'),
    site=about.get('site'),
    target_site=trained.config.target_site or None,
    context_size=config.get('context_length'),
    prepend_bos=bool(about.get('bos')) if about else None,
    settings=dataclasses.asdict(trained.config),
  )


def _folded(
  config: autoencoder.SaeConfig, sae: autoencoder.Sae
) -> dict[str, tensors_lib.Tensor]:
  """The weights by common name, with what no format has folded in."""
  d_model = config.d_model
  mean_D, scale = np.zeros(d_model), 1.0
  if config.preprocessing == 'dataset':
    mean_D = np.asarray(sae.data_mean_D, np.float64)
    scale = float(sae.data_scale)
  elif config.preprocessing == 'center_unit_norm':
    # Of the layer-normalised token, which is what a format's weights read.
    scale = math.sqrt(d_model - 1)
  out_mean_D, out_scale = mean_D, scale
  if config.target_site:
    out_mean_D = np.asarray(sae.target['target_mean_D'], np.float64)
    out_scale = float(sae.target['target_scale'])
  b_pre_D = np.asarray(sae.b_pre_D, np.float64)
  b_dec_D = out_scale * b_pre_D + out_mean_D
  arrays = {
    'w_enc_ND': _rows(sae.w_enc_ND, 1 / scale),
    'w_dec_ND': _rows(sae.w_dec_ND, out_scale),
    'b_lat_N': _whole(sae.b_lat_N),
  }
  if not autoencoder.has_input_bias(config) and mean_D.any():
    # W (x - m) / s + b: the mean's part of it is a bias.
    arrays['b_lat_N'] = _array(
      np.asarray(sae.b_lat_N, np.float64) - _product(sae, mean_D / scale)
    )
  if config.skip:
    skip_DD = np.asarray(sae.target['w_skip_DD'], np.float64)
    skip_DD *= out_scale / scale
    b_dec_D = b_dec_D - mean_D @ skip_DD
    arrays['w_skip_DD'] = _array(skip_DD.T)
  return arrays | {'b_dec_D': _array(b_dec_D)}


def _product(sae: autoencoder.Sae, vector_D: np.ndarray) -> np.ndarray:
  """W_enc times a vector, a block of rows at a time."""
  blocks = _rows(sae.w_enc_ND, 1.0).blocks()
  return np.concatenate([rows.astype(np.float64) @ vector_D for rows in blocks])


def _rows(array: jax.Array, factor: float) -> tensors_lib.Tensor:
  """A matrix times a number, of which rows are made as they are asked for."""

  def part(ranges) -> np.ndarray:
    index = tuple(slice(start, stop) for start, stop in ranges)
    rows = np.asarray(array[index])
    if factor == 1:
      return rows
    return (rows.astype(np.float64) * factor).astype(np.float32)

  return tensors_lib.Tensor(tuple(array.shape), np.dtype(np.float32), part)


def _whole(array: jax.Array) -> tensors_lib.Tensor:
  return _array(np.asarray(array))


def _array(array: np.ndarray) -> tensors_lib.Tensor:
  return tensors_lib.from_array(np.asarray(array, np.float32))
