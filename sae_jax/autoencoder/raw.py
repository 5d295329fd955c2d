"""Encoding and decoding of raw activations, of any leading shape.

Raw activations are those of the subject; an autoencoder works on preprocessed
ones. Tokens are worked on in blocks, so that the memory needed beside the
result does not grow with their number.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import errors
from sae_jax.autoencoder import model, preprocessing
from sae_jax.autoencoder.params import Sae, SaeConfig
from sae_jax.autoencoder.preprocessing import Affine
from sae_jax.ops import dense

Array: TypeAlias = np.ndarray | jax.Array

# Preprocessings with one affine map for all tokens; others have one for each.
_SHARED = ('none', 'dataset')
# Pre-activations of a block: 256 MiB in float32.
_BLOCK_ELEMENTS = 2**26
_MOST_ROWS = 4096


@flax.struct.dataclass
class Codes:
  """The active latents of tokens, and the way back to raw activations.

  Attributes:
    values: activations of the latents, [..., K]; a 0 is not active.
    indices: which latents these are, 0 to N - 1, [..., K].
    n_latents: N.
    affine: the way back, raw = x scale + shift. `encode` sets it: of each token
      if each has its own map (center_unit_norm, layer_norm, unit_rms, a
      transcoder's skip), else one row for all tokens. With None, as in codes
      made by hand, `decode` returns preprocessed activations. To decode other
      values into raw activations keep the map: `codes.replace(values=...)`.
  """

  values: Array
  indices: Array
  n_latents: int = flax.struct.field(pytree_node=False)
  affine: Affine | None = None

  def dense(self) -> Array:
    """The activation of every latent, [..., N]; repeated indices add up.

    Raises:
      UserError: if values and indices do not fit each other or N.
    """
    _check_codes(self, self.n_latents)
    return _in_blocks(
      lambda *pair: _scatter(*pair, self.n_latents),
      (self.values, self.indices),
      _block_rows(self.n_latents),
    )


def encode(config: SaeConfig, sae: Sae, raw: Array) -> Codes:
  """The active latents of raw activations.

  Args:
    config: the autoencoder's.
    sae: the autoencoder.
    raw: activations of the subject, [..., D], of any float type.

  Returns:
    Codes of the same leading shape, in the higher of the precisions of the
    autoencoder and `raw`. They are numpy arrays if `raw` is one, else jax
    arrays.

  Raises:
    UserError: if the width is not D.
  """
  raw = _checked_raw(sae, raw)
  values, indices, affine = _in_blocks(
    functools.partial(_encode, config, sae), (raw,), _block_rows(*_shape(sae))
  )
  if affine is None:
    affine = jax.tree.map(_library(raw).asarray, _shared_affine(config, sae))
  return Codes(values, indices, _shape(sae)[0], affine)


def decode(config: SaeConfig, sae: Sae, codes: Codes) -> Array:
  """The activations that codes stand for, [..., D].

  They are raw if `codes.affine` is set, as by `encode`, and preprocessed if it
  is None.

  Raises:
    UserError: if values and indices differ in shape, or the latents are not
      this autoencoder's.
  """
  _check_codes(codes, _shape(sae)[0])
  own, shared = codes.affine, None
  if _is_shared(config):
    own, shared = None, codes.affine
  elif own is not None and own.scale.shape[:-1] != codes.values.shape[:-1]:
    raise errors.UserError(
      f'codes with values of shape {codes.values.shape} and the affine map of '
      f'tokens {own.scale.shape[:-1]}: take the same tokens of both'
    )
  return _in_blocks(
    functools.partial(_decode, config, sae, shared),
    (codes.values, codes.indices, own),
    _block_rows(*_shape(sae)),
  )


def reconstruct(config: SaeConfig, sae: Sae, raw: Array) -> Array:
  """The autoencoder's reconstruction of raw activations, [..., D].

  Equal to `decode` of `encode`, to the bit, but never holds the codes of more
  than a block of tokens.

  Raises:
    UserError: if the width is not D.
  """
  shared = _shared_affine(config, sae)

  def function(raw_BD):
    return _decode(config, sae, shared, *_encode(config, sae, raw_BD))

  raw = _checked_raw(sae, raw)
  return _in_blocks(function, (raw,), _block_rows(*_shape(sae)))


@functools.partial(jax.jit, static_argnums=0)
def _encode(config, sae, raw_BD):
  """Values, indices, and each token's affine map; None if all share one."""
  x_BD, affine = preprocessing.preprocess(config, sae, raw_BD)
  vals_BK, idx_BK = model.encode(config, sae, x_BD)
  own = None
  if not _is_shared(config):
    own = preprocessing.way_back(config, sae, x_BD, affine)
  return vals_BK, idx_BK, own


@functools.partial(jax.jit, static_argnums=0)
def _decode(config, sae, shared, vals_BK, idx_BK, own):
  x_BD = model.decode(sae, vals_BK, idx_BK, dtype=config.matmul_dtype)
  affine = shared if own is None else own
  return x_BD if affine is None else preprocessing.restore(affine, x_BD)


_scatter = jax.jit(dense.scatter_codes, static_argnums=2)


def _shared_affine(config: SaeConfig, sae: Sae) -> Affine | None:
  """The affine map of all tokens, [1, D] and [1, 1]; None if they have none."""
  if not _is_shared(config):
    return None
  x_BD, affine = preprocessing.preprocess(config, sae, sae.data_mean_D[None])
  return preprocessing.way_back(config, sae, x_BD, affine)


def _is_shared(config: SaeConfig) -> bool:
  """Whether all tokens have one way back."""
  if config.target_site:
    return not config.skip
  return config.preprocessing in _SHARED


def _shape(sae: Sae) -> tuple[int, int]:
  return sae.w_enc_ND.shape


def _block_rows(*widths: int) -> int:
  """Tokens of a block, a power of two."""
  rows = min(_MOST_ROWS, max(1, _BLOCK_ELEMENTS // max(widths)))
  return 1 << (rows.bit_length() - 1)


def _library(*arrays: Array) -> Any:
  """The library of these arrays, numpy or jax.numpy."""
  return np if all(isinstance(a, np.ndarray) for a in arrays) else jnp


def _in_blocks(function: Callable, arrays: Any, block_rows: int) -> Any:
  """A function of arrays [B, ...] on arrays of any leading shape.

  A short last block is padded with zeros to a power of two, so that few shapes
  are compiled.

  Args:
    function: from arrays [B, ...] to a pytree of arrays [B, ...].
    arrays: its arguments, a pytree of arrays of one leading shape.
    block_rows: the largest B, a power of two.
  """
  leaves = jax.tree.leaves(arrays)
  library, leading = _library(*leaves), leaves[0].shape[:-1]
  n_rows = math.prod(leading)
  arrays = jax.tree.map(lambda a: a.reshape(n_rows, a.shape[-1]), arrays)

  def results(start):
    rows = min(block_rows, n_rows - start)
    fill = (0, (1 << max(0, rows - 1).bit_length()) - rows), (0, 0)
    block = jax.tree.map(
      lambda a: library.pad(a[start : start + rows], fill), arrays
    )
    return jax.tree.map(lambda a: library.asarray(a[:rows]), function(*block))

  # Without rows there is one block of zeros, for the shapes of the result.
  return jax.tree.map(
    lambda *a: library.concatenate(a).reshape(*leading, a[0].shape[-1]),
    *map(results, range(0, max(1, n_rows), block_rows)),
  )


def _checked_raw(sae: Sae, raw: Array) -> Array:
  raw = raw if isinstance(raw, jax.Array) else np.asarray(raw)
  width = _shape(sae)[1]
  if raw.shape[-1:] != (width,):
    raise errors.UserError(
      f'activations of shape {raw.shape}, the autoencoder reads width {width}: '
      f'give [..., {width}], those of the site it was trained on'
    )
  return raw


def _check_codes(codes: Codes, n_latents: int) -> None:
  values, indices = codes.values, codes.indices
  if values.shape != indices.shape or not values.ndim:
    raise errors.UserError(
      f'codes with values of shape {values.shape} and indices of shape '
      f'{indices.shape}: give [..., K] of both'
    )
  if codes.n_latents != n_latents:
    raise errors.UserError(
      f'codes of {codes.n_latents} latents, the autoencoder has {n_latents}: '
      'give codes of this autoencoder'
    )
  # An array under jit has no values to look at.
  if indices.size and not isinstance(indices, jax.core.Tracer):
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= n_latents:
      raise errors.UserError(
        f'codes with indices {low} to {high} of {n_latents} latents: give '
        f'0 to {n_latents - 1}'
      )
