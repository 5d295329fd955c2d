"""Maps activations into the space the autoencoder works in, and back."""

import flax.struct
import jax
import jax.numpy as jnp

from sae_jax import ops
from sae_jax.autoencoder.params import Sae, SaeConfig, SKIP
from sae_jax.ops import scopes

_LAYER_NORM_EPS = 1e-5


@flax.struct.dataclass
class Affine:
  """The map of preprocessing: x = (raw - shift) / scale."""

  shift: jax.Array
  scale: jax.Array


@jax.named_scope(scopes.PREPROCESSING)
def preprocess(
  config: SaeConfig, sae: Sae, raw_BD: jax.Array
) -> tuple[jax.Array, Affine]:
  """Brings activations into the space the autoencoder works in.

  Args:
    config: names the preprocessing (Gao et al. 2024, section 2; layer_norm as
      in the code released with it; unit_rms as SAELens's
      constant_norm_rescale).
    sae: holds the dataset's statistics.
    raw_BD: activations of the subject; of a transcoder, those that are
      reconstructed may follow in the same rows, [B, 2 D].

  Returns:
    x_BD in the higher of the precisions of the parameters and `raw_BD`, and the
    map for `restore` to undo it. A constant token becomes
    zero, with unit_rms a zero one.
  """
  raw_BD = raw_BD.astype(jnp.result_type(raw_BD, sae.b_pre_D))
  raw_BD, _ = halves(config, raw_BD)
  if config.preprocessing == 'none':
    affine = Affine(jnp.zeros_like(raw_BD[:, :1]), jnp.ones_like(raw_BD[:, :1]))
  elif config.preprocessing == 'dataset':
    affine = Affine(
      jnp.broadcast_to(sae.data_mean_D, raw_BD.shape),
      jnp.broadcast_to(sae.data_scale, raw_BD[:, :1].shape),
    )
  elif config.preprocessing == 'unit_rms':
    rms_B1 = jnp.sqrt((raw_BD**2).mean(-1, keepdims=True))
    affine = Affine(jnp.zeros_like(rms_B1), jnp.where(rms_B1 > 0, rms_B1, 1))
  else:
    shift_B1 = raw_BD.mean(-1, keepdims=True)
    centred_BD = raw_BD - shift_B1
    if config.preprocessing == 'center_unit_norm':
      norm_B1 = jnp.linalg.norm(centred_BD, axis=-1, keepdims=True)
      # A constant token has a smaller norm, from the rounding of the mean.
      eps = 4 * jnp.finfo(raw_BD.dtype).eps * raw_BD.shape[-1] ** 0.5
      varies_B1 = norm_B1 > eps * jnp.abs(shift_B1)
      affine = Affine(
        jnp.where(varies_B1, shift_B1, raw_BD[:, :1]),
        jnp.where(varies_B1, norm_B1, 1),
      )
    else:
      variance_B1 = (centred_BD**2).sum(-1, keepdims=True) / (
        raw_BD.shape[-1] - 1
      )
      affine = Affine(shift_B1, jnp.sqrt(variance_B1) + _LAYER_NORM_EPS)
  return (raw_BD - affine.shift) / affine.scale, affine


def restore(affine: Affine, x_BD: jax.Array) -> jax.Array:
  """The inverse of `preprocess` with the same token's affine map."""
  return x_BD * affine.scale + affine.shift


def halves(
  config: SaeConfig, rows_BX: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """What is read and what is reconstructed, of rows that hold both.

  Args:
    config: says whether it is a transcoder, whose two have equal widths.
    rows_BX: [B, D], or [B, 2 D] of a transcoder.

  Returns:
    Two arrays [B, D]: of an autoencoder, or where a transcoder's rows have no
    target, the rows twice.
  """
  if not config.target_site or rows_BX.shape[-1] == config.d_model:
    return rows_BX, rows_BX
  return rows_BX[:, : config.d_model], rows_BX[:, config.d_model :]


def tokens(
  config: SaeConfig, sae: Sae, raw_BX: jax.Array
) -> tuple[jax.Array, Affine]:
  """Preprocessed rows with their targets, and the way back of these.

  Args:
    config: the autoencoder's.
    sae: holds the statistics.
    raw_BX: [B, D], or [B, 2 D] of a transcoder.

  Returns:
    Rows that `halves` takes apart: of an autoencoder what `preprocess` gives,
    of a transcoder [B, 2 D]; and the map of the targets.
  """
  x_BD, affine = preprocess(config, sae, raw_BX)
  if not config.target_site:
    return x_BD, affine
  _, target_BD = halves(config, raw_BX)
  with jax.named_scope(scopes.PREPROCESSING):
    back = _target_affine(sae, x_BD)
    target_BD = (target_BD.astype(x_BD.dtype) - back.shift) / back.scale
    return jnp.concatenate([x_BD, target_BD], axis=1), back


def way_back(
  config: SaeConfig, sae: Sae, x_BD: jax.Array, affine: Affine
) -> Affine:
  """The map from decoded latents, b_pre included, to raw activations.

  Args:
    config: the autoencoder's.
    sae: the autoencoder.
    x_BD: preprocessed tokens.
    affine: their own map.

  Returns:
    `affine`, but that layer_norm has no epsilon on the way back (the code of
    Gao et al. 2024); of a transcoder that of what it reconstructs, with the
    skip.
  """
  if not config.target_site:
    if config.preprocessing == 'layer_norm':
      return Affine(affine.shift, affine.scale - _LAYER_NORM_EPS)
    return affine
  back = _target_affine(sae, x_BD)
  shift_BD = back.shift + back.scale * skipped(config, sae, x_BD)
  return Affine(shift_BD, back.scale)


@jax.named_scope(scopes.DECODER)
def skipped(config: SaeConfig, sae: Sae, x_BD: jax.Array) -> jax.Array:
  """What a skip adds to the reconstruction; zeros without one."""
  if not config.skip:
    return jnp.zeros_like(x_BD)
  return ops.matmul(x_BD, sae.target[SKIP], config.matmul_dtype)


def _target_affine(sae: Sae, x_BD: jax.Array) -> Affine:
  return Affine(
    jnp.broadcast_to(sae.target['target_mean_D'], x_BD.shape),
    jnp.broadcast_to(sae.target['target_scale'], x_BD[:, :1].shape),
  )
