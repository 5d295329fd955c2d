"""An autoencoder's config and its arrays."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.autoencoder import thresholds
from sae_jax.tpu import target

PREPROCESSING = ('none', 'center_unit_norm', 'layer_norm', 'dataset')
MATMULS = ('auto', 'float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class SaeConfig(config_lib.Config):
  """What an autoencoder is, apart from its weights."""

  d_model: int = config_lib.option(0, 'width of the activations, D', least=0)
  n_latents: int = config_lib.option(4096, 'number of latents, N', least=1)
  k: int = config_lib.option(32, 'active latents per token, K', least=1)
  activation: str = config_lib.option(
    'topk',
    'topk, or a baseline: relu (trained with an L1 penalty) or jumprelu (with '
    'an L0 penalty), whose number of active latents k does not set',
    thresholds.ACTIVATIONS,
  )
  preprocessing: str = config_lib.option(
    'center_unit_norm',
    'of each activation before encoding: its own mean removed and unit norm '
    '(center_unit_norm), its own mean and unbiased std (layer_norm), the '
    "dataset's mean and scale (dataset), or none",
    PREPROCESSING,
  )
  matmul: str = config_lib.option(
    'auto',
    'of dense products: float32, bfloat16 (sums stay float32; parameters and '
    "Adam's moments are float32 always), or auto: bfloat16 on a TPU",
    MATMULS,
  )
  encoder_init: str = config_lib.option(
    'transposed',
    "first encoder: the decoder's transpose, or drawn apart from it "
    '(independent), which leaves more latents dead',
    ('transposed', 'independent'),
  )

  @property
  def matmul_dtype(self) -> jnp.dtype | None:
    """What factors of dense products are rounded to, None for nothing."""
    rounded = self.matmul == 'bfloat16' or (
      self.matmul == 'auto' and target.platform() == 'tpu'
    )
    return jnp.dtype(jnp.bfloat16) if rounded else None

  def __post_init__(self):
    super().__post_init__()
    if self.k > self.n_latents:
      raise errors.UserError(
        f'k {self.k} exceeds n_latents {self.n_latents}: use fewer'
      )


@flax.struct.dataclass
class Sae:
  """Parameters; data_mean_D and data_scale are not trained.

  Attributes:
    w_enc_ND: encoder, a row per latent.
    w_dec_ND: decoder, a row of unit norm per latent.
    b_lat_N: latent bias, added to the pre-activations.
    b_pre_D: bias subtracted before the encoder and added after the decoder.
    data_mean_D: mean of the dataset; used by preprocessing 'dataset'.
    data_scale: RMS distance from it; used by preprocessing 'dataset'.
    log_threshold_N: logarithm of each latent's threshold; jumprelu has it.
  """

  w_enc_ND: jax.Array
  w_dec_ND: jax.Array
  b_lat_N: jax.Array
  b_pre_D: jax.Array
  data_mean_D: jax.Array
  data_scale: jax.Array
  log_threshold_N: jax.Array | None = None


def to_dict(sae: Sae) -> dict[str, jax.Array]:
  """All arrays by name. These are the names in a checkpoint."""
  arrays = {f.name: getattr(sae, f.name) for f in dataclasses.fields(sae)}
  return {name: a for name, a in arrays.items() if a is not None}


def from_dict(arrays: dict[str, jax.Array]) -> Sae:
  """The inverse of `to_dict`."""
  return Sae(**arrays)


def with_arrays(sae: Sae, arrays: dict[str, jax.Array]) -> Sae:
  """The autoencoder with some of its arrays, by name, replaced."""
  return from_dict(to_dict(sae) | arrays)


def trained(sae: Sae) -> dict[str, jax.Array]:
  """The parameters that are trained, by name."""
  params = {
    'w_enc_ND': sae.w_enc_ND,
    'w_dec_ND': sae.w_dec_ND,
    'b_lat_N': sae.b_lat_N,
    'b_pre_D': sae.b_pre_D,
    'log_threshold_N': sae.log_threshold_N,
  }
  return {name: array for name, array in params.items() if array is not None}
