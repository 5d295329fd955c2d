"""From autoencoders of other libraries to ours, as equal functions.

What ours cannot be is refused; what is only written otherwise is folded into
the weights:

  a latent measured by the norm of its decoder row    encoder and bias times it,
                                                      the row divided by it
  another scale of what is written than of what is    decoder and its bias times
  read, in an autoencoder                             the ratio
"""

import numpy as np

from sae_jax import autoencoder, errors
from sae_jax.interchange import folding, imported, weights
from sae_jax.interchange.imported import Imported, Semantics
from sae_jax.storage import tensors as tensors_lib

# Norms of decoder rows that differ from 1 by less are rounding.
_ROUNDING = 1e-4
_PREPROCESSING = {
  'none': 'none',
  'layer_norm': 'layer_norm',
  'constant_norm_rescale': 'unit_rms',
  'dataset': 'dataset',
}


def to_ours(
  of: Imported, target_site: str = ''
) -> tuple[autoencoder.SaeConfig, autoencoder.Sae]:
  """An autoencoder of another library as one of ours.

  Args:
    of: what it is.
    target_site: of a transcoder, the site that it writes; '' for what the file
      says; of others none.

  Returns:
    Its config; its arrays as `tensors.Tensor` in float32, which are read and
    folded part by part as they are asked for.

  Raises:
    UserError: if ours cannot be that function; it names the property.
  """
  check(of)
  norm_N = folding.row_norms(of)
  return config_of(of, norm_N, target_site), _sae(of, norm_N)


def config_of(
  of: Imported, norm_N: np.ndarray, target_site: str = ''
) -> autoencoder.SaeConfig:
  """The config, of an autoencoder that can be ours.

  Args:
    of: what it is.
    norm_N: norms of its decoder rows.
    target_site: see `to_ours`.
  """
  semantics = of.semantics
  transcodes = imported.is_transcoder(of)
  ratio = 1.0 if transcodes else _ratio(semantics)
  unit = semantics.rescale_by_decoder_norm and ratio == 1
  unit |= bool((abs(ratio * norm_N - 1) < _ROUNDING).all())
  activation = semantics.nonlinearity
  if activation == 'batchtopk' and semantics.threshold is None:
    # Every latent's own threshold is none of a batch.
    activation = 'jumprelu'
  return autoencoder.SaeConfig(
    d_model=of.d_in,
    n_latents=of.n_latents,
    k=semantics.k or min(32, of.n_latents),
    activation=activation,
    preprocessing=_PREPROCESSING[semantics.normalisation],
    pre_bias='tied' if semantics.subtract_b_dec else 'output',
    decoder_norm='unit' if unit else 'free',
    jump_threshold='value' if activation == 'jumprelu' else 'log',
    target_site=(target_site or of.provenance.target_site or imported.TARGET)
    if transcodes
    else '',
    skip='w_skip_DD' in of.tensors,
    encoder_init='transposed',
  )


def check(of: Imported) -> None:
  """Raises UserError for what ours cannot be."""
  semantics = of.semantics
  transcodes = imported.is_transcoder(of)
  reasons = []
  if of.d_in != of.d_out:
    reasons.append(f'reads width {of.d_in} and writes width {of.d_out}')
  if not semantics.is_rectified:
    reasons.append('has latents below 0 (no ReLU after its largest)')
  if transcodes and semantics.subtract_b_dec:
    reasons.append('subtracts the bias of what it writes from what it reads')
  if transcodes and semantics.normalisation in (
    'layer_norm',
    'constant_norm_rescale',
  ):
    reasons.append(
      f'writes at the scale of each token that it reads '
      f'({semantics.normalisation}) at another site'
    )
  if not transcodes and _ratio(semantics) != 1 and semantics.subtract_b_dec:
    reasons.append(
      'subtracts its bias, and has other scales of what it reads and writes'
    )
  if semantics.nonlinearity == 'groupmax' and of.n_latents % semantics.k:
    reasons.append(
      f'has {of.n_latents} latents in {semantics.k} groups of other sizes'
    )
  if reasons:
    raise errors.UserError(
      f'{of.url} ({of.format}) {"; it ".join(reasons)}: no autoencoder here '
      'is that, so it cannot be converted'
    )


def _ratio(semantics: Semantics) -> float:
  """Scale of what is read over that of what is written."""
  if semantics.normalisation != 'dataset':
    return 1.0
  return semantics.scale_in / semantics.scale_out


def _sae(of: Imported, norm_N: np.ndarray) -> autoencoder.Sae:
  """The arrays, folded."""
  semantics, tensors = of.semantics, of.tensors
  transcodes = imported.is_transcoder(of)
  fold_N = norm_N if semantics.rescale_by_decoder_norm else np.ones(len(norm_N))
  ratio = 1.0 if transcodes else _ratio(semantics)
  # A row without length is that of a latent that says nothing.
  per_row_N = ratio / np.where(fold_N > 0, fold_N, 1)
  zeros_N = _array(np.zeros(of.n_latents))
  matrices = {
    name: weights.ordered(of, name, weights.axes(name))
    for name in ('w_enc_ND', 'w_dec_ND')
  }
  bias = 'b_gate_N' if semantics.nonlinearity == 'gated' else 'b_enc_N'
  return autoencoder.Sae(
    w_enc_ND=_scaled(matrices['w_enc_ND'], fold_N),
    w_dec_ND=_scaled(matrices['w_dec_ND'], per_row_N),
    b_lat_N=_scaled(tensors.get(bias, zeros_N), fold_N),
    b_pre_D=_scaled(tensors['b_dec_D'], np.full(of.d_out, ratio)),
    data_mean_D=_array(np.zeros(of.d_in)),
    data_scale=_array(np.float64(1 / (semantics.scale_in or 1.0))),
    extra=_extra(of),
    target=_target(of) if transcodes else {},
  )


def _extra(of: Imported) -> dict[str, tensors_lib.Tensor]:
  """The nonlinearity's own parameters."""
  semantics, tensors = of.semantics, of.tensors
  if semantics.nonlinearity == 'gated':
    return {
      name: weights.single(tensors[name]) for name in ('r_mag_N', 'b_mag_N')
    }
  if semantics.nonlinearity not in ('jumprelu', 'batchtopk'):
    return {}
  if semantics.threshold is None:
    return {'threshold_N': weights.single(tensors['threshold_N'])}
  if semantics.nonlinearity == 'batchtopk':
    return {'threshold': _array(np.float64(semantics.threshold))}
  return {'threshold_N': _array(np.full(of.n_latents, semantics.threshold))}


def _target(of: Imported) -> dict[str, tensors_lib.Tensor]:
  """A transcoder's own arrays."""
  semantics = of.semantics
  scale = 1 / (semantics.scale_out or 1.0)
  arrays = {
    'target_mean_D': _array(np.zeros(of.d_out)),
    'target_scale': _array(np.float64(scale)),
  }
  if 'w_skip_DD' in of.tensors:
    # A row for each width that is read, of what the skip makes of x^.
    by_read = of.tensors['w_skip_DD'].T
    factor = 1 / (semantics.scale_in or 1.0) / scale
    arrays['w_skip_DD'] = _scaled(by_read, np.full(of.d_in, factor))
  return arrays


def _scaled(
  tensor: tensors_lib.Tensor, rows_N: np.ndarray
) -> tensors_lib.Tensor:
  """A tensor's rows, each times its factor, in float32."""
  if (rows_N == 1).all():
    return weights.single(tensor)
  return folding.times(tensor, rows_N)


def _array(array: np.ndarray) -> tensors_lib.Tensor:
  return tensors_lib.from_array(np.asarray(array, np.float32))
