"""From autoencoders of other libraries to ours, as equal functions.

What ours cannot be is refused; what is only written otherwise is folded into
the weights:

  a latent measured by the norm of its decoder row    encoder and bias times it,
                                                      the row divided by it
  another scale of what is written than of what is    decoder and its bias times
  read, in an autoencoder                             the ratio
"""

from collections.abc import Callable

import jax
import numpy as np

from sae_jax import autoencoder, errors
from sae_jax import mesh as mesh_lib
from sae_jax.interchange import folding, imported
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
# Of rows that are read at a time, so that little is in memory beside an array.
_BLOCK_BYTES = 2**26


def to_ours(
  of: Imported,
  mesh: jax.sharding.Mesh | None = None,
  target_site: str = '',
) -> tuple[autoencoder.SaeConfig, autoencoder.Sae]:
  """An autoencoder of another library as one of ours.

  Args:
    of: what it is; its weights are read here, by each process those of its
      devices.
    mesh: with the axes of `mesh.AXES`; None for one device.
    target_site: of a transcoder, the site that it writes; '' for what the file
      says; of others none.

  Raises:
    UserError: if ours cannot be that function; it names the property.
  """
  check(of)
  norm_N = folding.row_norms(of)
  return config_of(of, norm_N, target_site), _sae(of, norm_N, mesh)


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


def _sae(
  of: Imported, norm_N: np.ndarray, mesh: jax.sharding.Mesh | None
) -> autoencoder.Sae:
  """The arrays in float32, folded, over the mesh."""
  semantics, tensors = of.semantics, of.tensors
  transcodes = imported.is_transcoder(of)
  fold_N = norm_N if semantics.rescale_by_decoder_norm else np.ones(len(norm_N))
  ratio = 1.0 if transcodes else _ratio(semantics)
  # A row without length is that of a latent that says nothing.
  per_row_N = ratio / np.where(fold_N > 0, fold_N, 1)
  zeros_N = tensors_lib.from_array(np.zeros(of.n_latents, np.float32))

  def place(name, tensor, rows_N=None):
    return _placed(name, tensor, rows_N, mesh)

  bias = 'b_gate_N' if semantics.nonlinearity == 'gated' else 'b_enc_N'
  scale_in = semantics.scale_in or 1.0
  return autoencoder.Sae(
    w_enc_ND=place('w_enc_ND', tensors['w_enc_ND'], fold_N),
    w_dec_ND=place('w_dec_ND', tensors['w_dec_ND'], per_row_N),
    b_lat_N=place('b_lat_N', tensors.get(bias, zeros_N), fold_N),
    b_pre_D=place('b_pre_D', tensors['b_dec_D'], np.full(of.d_out, ratio)),
    data_mean_D=_small('data_mean_D', np.zeros(of.d_in), mesh),
    data_scale=_small('data_scale', np.float64(1 / scale_in), mesh),
    extra=_extra(of, place),
    target=_target(of, place, mesh) if transcodes else {},
  )


def _extra(of: Imported, place: Callable) -> dict[str, jax.Array]:
  """The nonlinearity's own parameters."""
  semantics, tensors = of.semantics, of.tensors
  if semantics.nonlinearity == 'gated':
    return {name: place(name, tensors[name]) for name in ('r_mag_N', 'b_mag_N')}
  if semantics.nonlinearity not in ('jumprelu', 'batchtopk'):
    return {}
  if semantics.threshold is None:
    return {'threshold_N': place('threshold_N', tensors['threshold_N'])}
  if semantics.nonlinearity == 'batchtopk':
    scalar = tensors_lib.from_array(np.float32(semantics.threshold))
    return {'threshold': place('threshold', scalar)}
  same_N = np.full(of.n_latents, semantics.threshold, np.float32)
  return {'threshold_N': place('threshold_N', tensors_lib.from_array(same_N))}


def _target(of: Imported, place: Callable, mesh) -> dict[str, jax.Array]:
  """A transcoder's own arrays."""
  semantics = of.semantics
  scale = 1 / (semantics.scale_out or 1.0)
  arrays = {
    'target_mean_D': _small('target_mean_D', np.zeros(of.d_out), mesh),
    'target_scale': _small('target_scale', np.float64(scale), mesh),
  }
  if 'w_skip_DD' in of.tensors:
    # A row for each width that is read, of what the skip makes of x^.
    by_read = of.tensors['w_skip_DD'].T
    factor = 1 / (semantics.scale_in or 1.0) / scale
    arrays['w_skip_DD'] = place('w_skip_DD', by_read, np.full(of.d_in, factor))
  return arrays


def _placed(
  name: str,
  tensor: tensors_lib.Tensor,
  rows_N: np.ndarray | None,
  mesh: jax.sharding.Mesh | None,
) -> jax.Array:
  """A tensor's rows, each times its factor, in float32 over the mesh."""

  plain = rows_N is None or bool((rows_N == 1).all())

  def part(index):
    if not tensor.shape:
      return tensor.read().astype(np.float32)
    first, last, _ = index[0].indices(tensor.shape[0])
    out = np.empty((last - first, *tensor.shape[1:]), np.float32)
    step = max(1, _BLOCK_BYTES // max(1, out.nbytes // max(1, len(out))))
    for start in range(first, last, step):
      stop = min(last, start + step)
      rows = tensor.read(start, stop)
      if not plain:
        factor = rows_N[start:stop].reshape(-1, *[1] * (rows.ndim - 1))
        rows = rows.astype(np.float64) * factor
      out[start - first : stop - first] = rows
    return out

  return jax.make_array_from_callback(tensor.shape, _where(name, mesh), part)


def _small(name: str, value: np.ndarray, mesh) -> jax.Array:
  """An array that every device has whole."""
  whole = np.asarray(value, np.float32)
  return jax.make_array_from_callback(
    whole.shape, _where(name, mesh), lambda index: whole[index]
  )


def _where(name: str, mesh: jax.sharding.Mesh | None) -> jax.sharding.Sharding:
  if mesh is None:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return mesh_lib.sharding(mesh, mesh_lib.letters(name))
