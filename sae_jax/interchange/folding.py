"""The same function with other weights, where a format has no word for it.

In this order, by the names of `imported`:

  rescale_by_decoder_norm   w_enc_ND and b_enc_N times the norm of the decoder's
                            row, the row divided by it
  normalisation 'dataset'   w_enc_ND times scale_in, w_dec_ND and b_dec_D over
                            scale_out; a bias that is subtracted is not any more
                            if the scales differ
  subtract_b_dec            b_enc_N less w_enc_ND b_dec_D if it is not any more,
                            plus that if it was not; the two biases of 'gated'
                            likewise

Values are computed in float64, those of matrices as they are asked for, and are
float32.
"""

import dataclasses

import numpy as np

from sae_jax.interchange.imported import Imported
from sae_jax.storage import tensors as tensors_lib

_F32 = np.dtype(np.float32)
# Bytes of rows that become float64 at once.
_BLOCK = 2**24


def folded(
  of: Imported, *, rescales: bool = False, subtracts: bool | None = None
) -> Imported:
  """The same function, without what a format has no word for.

  Tensors that need not change are those of the autoencoder. It has a b_enc_N
  unless it is gated.

  Args:
    of: what it is.
    rescales: whether it may be rescaled by the decoder's norm.
    subtracts: whether it is to subtract the decoder's bias; None for as it
      does. True only where it writes the width that it reads.
  """
  semantics = of.semantics
  dataset = semantics.normalisation == 'dataset'
  of = with_bias(of)
  if semantics.rescale_by_decoder_norm and (not rescales or dataset):
    of = _without_norms(of)
  if dataset:
    if semantics.scale_in != semantics.scale_out:
      of = _with_subtraction(of, False)
    of = _without_scales(of)
  return of if subtracts is None else _with_subtraction(of, subtracts)


def with_bias(of: Imported) -> Imported:
  """With a bias of zeros if it has none and is not gated."""
  if of.semantics.nonlinearity == 'gated' or 'b_enc_N' in of.tensors:
    return of
  return _with(of, b_enc_N=_array(np.zeros(of.n_latents)))


def is_rectified(of: Imported) -> bool:
  """Whether no latent is ever below 0."""
  semantics = of.semantics
  if semantics.nonlinearity in ('relu', 'gated'):
    return True
  if semantics.is_rectified or semantics.relu_before_topk:
    return True
  if semantics.nonlinearity in ('jumprelu', 'batchtopk'):
    return bool((_read(thresholds(of)) >= 0).all())
  return False


def thresholds(of: Imported, least: float = -np.inf) -> tensors_lib.Tensor:
  """A threshold for each latent of a 'jumprelu' or 'batchtopk'.

  Args:
    of: what it is.
    least: what those below it become: 0 is a ReLU after the comparison.
  """
  if of.semantics.threshold is None:
    stored = of.tensors['threshold_N']
    values_N = stored.read()
    if (values_N >= least).all():
      return stored
  else:
    values_N = np.full(of.n_latents, of.semantics.threshold)
  return _array(np.maximum(values_N.astype(np.float64), least))


def row_norms(of: Imported) -> np.ndarray:
  """Norms of the decoder's rows, [N] in float64."""
  tensor = of.tensors['w_dec_ND']
  if 'w_dec_ND' not in of.transposed:
    return np.concatenate(
      [
        np.linalg.norm(rows_ND.astype(np.float64), axis=1)
        for rows_ND in tensor.blocks(_BLOCK)
      ]
    )
  squares_N = np.zeros(of.n_latents)
  for rows_DN in tensor.T.blocks():
    values_DN = _f64(rows_DN)
    squares_N += np.square(values_DN, out=values_DN).sum(0)
  return np.sqrt(squares_N)


def _without_norms(of: Imported) -> Imported:
  norm_N = row_norms(of)
  changes = {
    'w_enc_ND': times(of.tensors['w_enc_ND'], norm_N),
    # A row without length is that of a latent that says nothing.
    'w_dec_ND': times(of.tensors['w_dec_ND'], 1 / np.where(norm_N, norm_N, 1)),
  }
  if 'b_enc_N' in of.tensors:
    changes['b_enc_N'] = times(of.tensors['b_enc_N'], norm_N)
  return _with(of, {'rescale_by_decoder_norm': False}, **changes)


def _without_scales(of: Imported) -> Imported:
  scale_in, scale_out = of.semantics.scale_in, of.semantics.scale_out
  return _with(
    of,
    {'normalisation': 'none', 'scale_in': None, 'scale_out': None},
    w_enc_ND=times(of.tensors['w_enc_ND'], np.full(of.n_latents, scale_in)),
    w_dec_ND=times(
      of.tensors['w_dec_ND'], np.full(of.n_latents, 1 / scale_out)
    ),
    b_dec_D=times(of.tensors['b_dec_D'], np.full(of.d_out, 1 / scale_out)),
  )


def _with_subtraction(of: Imported, subtracts: bool) -> Imported:
  if of.semantics.subtract_b_dec == subtracts:
    return of
  change = {'subtract_b_dec': subtracts}
  b_dec_D = _read(of.tensors['b_dec_D'])
  if not b_dec_D.any():
    return _with(of, change)
  shift_N = _product(of, b_dec_D) * (1 if subtracts else -1)
  if of.semantics.nonlinearity != 'gated':
    b_enc_N = _read(of.tensors['b_enc_N']) + shift_N
    return _with(of, change, b_enc_N=_array(b_enc_N))
  scale_N = np.exp(_read(of.tensors['r_mag_N']))
  return _with(
    of,
    change,
    b_gate_N=_array(_read(of.tensors['b_gate_N']) + shift_N),
    b_mag_N=_array(_read(of.tensors['b_mag_N']) + scale_N * shift_N),
  )


def _product(of: Imported, vector_D: np.ndarray) -> np.ndarray:
  """The encoder's matrix times a vector."""
  tensor = of.tensors['w_enc_ND']
  if 'w_enc_ND' not in of.transposed:
    return np.concatenate([_f64(rows) @ vector_D for rows in tensor.blocks()])
  product_N, start = np.zeros(of.n_latents), 0
  for rows_DN in tensor.T.blocks():
    stop = start + len(rows_DN)
    product_N += vector_D[start:stop] @ _f64(rows_DN)
    start = stop
  return product_N


def _with(of: Imported, semantics: dict | None = None, **tensors) -> Imported:
  return dataclasses.replace(
    of,
    semantics=dataclasses.replace(of.semantics, **(semantics or {})),
    tensors=of.tensors | tensors,
  )


def times(
  tensor: tensors_lib.Tensor, factor_N: np.ndarray
) -> tensors_lib.Tensor:
  """A tensor times a factor for each row, in float32."""

  def part(ranges: tensors_lib.Ranges) -> np.ndarray:
    values = tensor.part(ranges)
    factor = factor_N[slice(*ranges[0])].reshape(-1, *[1] * (values.ndim - 1))
    # In float64, of which there are no more than a few values at a time.
    out = np.empty(values.shape, _F32)
    return np.multiply(values, factor, out=out, casting='same_kind')

  return dataclasses.replace(tensor, dtype=_F32, part=part)


def _f64(array: np.ndarray) -> np.ndarray:
  return array.astype(np.float64)


def _read(tensor: tensors_lib.Tensor) -> np.ndarray:
  return _f64(tensor.read())


def _array(array: np.ndarray) -> tensors_lib.Tensor:
  return tensors_lib.from_array(array.astype(_F32))
