"""An autoencoder's config and its arrays."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.autoencoder import nonlinearity
from sae_jax.tpu import target

PREPROCESSING = (
  'none', 'center_unit_norm', 'layer_norm', 'unit_rms', 'dataset',
)  # fmt: skip
TIED, OUTPUT = 'tied', 'output'
UNIT, FREE = 'unit', 'free'
MATMULS = ('auto', 'float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class SaeConfig(config_lib.Config):
  """Everything about an autoencoder but its weights."""

  d_model: int = config_lib.option(
    0, 'width of the activations, D; 0 for the width of the store', least=0
  )
  n_latents: int = config_lib.option(
    4096,
    'number of latents, N',
    least=1,
    # Their numbers are int32.
    most=2**31 - 1,
  )
  k: int = config_lib.option(
    32, 'number of active latents of a token, K', least=1
  )
  activation: str = config_lib.option(
    nonlinearity.NAMES[0],
    "the encoder's nonlinearity. "
    + '; '.join(
      f'{name}: {nonlinearity.summary(name)}' for name in nonlinearity.NAMES
    ),
    nonlinearity.NAMES,
  )
  preprocessing: str = config_lib.option(
    'center_unit_norm',
    'change of each activation before it is encoded: subtract its own mean and'
    ' scale it to unit norm (center_unit_norm) or to unit standard deviation '
    '(layer_norm); scale it to a root mean square of 1 (unit_rms); subtract '
    "the dataset's mean and divide by its scale (dataset); or none",
    PREPROCESSING,
  )
  pre_bias: str = config_lib.option(
    TIED,
    'where the decoder bias b_pre is: subtracted before the encoder and added '
    'after the decoder (tied), or added after the decoder alone (output, which '
    'a transcoder has in any case)',
    (TIED, OUTPUT),
    later=True,
  )
  decoder_norm: str = config_lib.option(
    UNIT,
    'length of decoder rows: 1 after every step (unit), or what training makes '
    'it (free), as others train',
    (UNIT, FREE),
    later=True,
  )
  jump_threshold: str = config_lib.option(
    'log',
    "what of JumpReLU's thresholds is trained: their logarithm (log), or "
    'themselves (value), as in checkpoints of others',
    ('log', 'value'),
    later=True,
  )
  matmul: str = config_lib.option(
    'auto',
    'type that factors of dense products are rounded to: float32, bfloat16, or'
    ' auto for bfloat16 on a TPU and float32 elsewhere. Sums, parameters and '
    "Adam's moments are always float32",
    MATMULS,
  )
  target_site: str = config_lib.option(
    '',
    'site of the same store whose activations are reconstructed from those of '
    'site: a transcoder; empty for an autoencoder, which reconstructs what it '
    'reads',
    shared=True,
    later=True,
  )
  skip: bool = config_lib.option(
    False,
    'add a linear map of the input to the reconstruction, in a transcoder',
    later=True,
  )
  encoder_init: str = config_lib.option(
    'transposed',
    'initial encoder: the transpose of the decoder (transposed), or drawn '
    'independently of it, which leaves more latents dead. That of a transcoder '
    'is independent, or with decoder_init data of the same tokens',
    ('transposed', 'independent'),
  )
  decoder_init: str = config_lib.option(
    'auto',
    'initial decoder: random directions (random), or rows of the activations '
    'themselves, half whitened (data), of which sample_rows must be as many as '
    'there are latents; auto for data in short runs with so many, else random',
    ('auto', 'random', 'data'),
  )
  bias_init: str = config_lib.option(
    'median',
    'initial decoder bias b_pre: the geometric median (median) or the mean of '
    'sample_rows activations',
    ('median', 'mean'),
  )
  encoder_gain: str = config_lib.option(
    'auto',
    'initial length of the encoder: so that reconstructions have the norm of '
    'the inputs (norm), or are nearest to them (least_squares), which is '
    'shorter; auto for least_squares in short runs, else norm',
    ('auto', 'norm', 'least_squares'),
  )

  @property
  def row_width(self) -> int:
    """Width of a row of data: a transcoder's has what it reconstructs too."""
    return self.d_model * (2 if self.target_site else 1)

  @property
  def matmul_dtype(self) -> jnp.dtype | None:
    """The type that factors of dense products are rounded to, or None."""
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
    if self.skip and not self.target_site:
      raise errors.UserError(
        'skip is for a transcoder, an autoencoder would be a linear map alone: '
        'give a target_site, or leave skip out'
      )


@flax.struct.dataclass
class Sae:
  """The arrays of an autoencoder or a transcoder.

  Statistics of the data, its mean and scale, are not trained.

  Attributes:
    w_enc_ND: encoder, a row per latent.
    w_dec_ND: decoder, a row per latent, of unit norm unless `decoder_norm` is
      free.
    b_lat_N: latent bias, added to the pre-activations.
    b_pre_D: bias added after the decoder and, unless `pre_bias` is output,
      subtracted before the encoder.
    data_mean_D: mean of the dataset; used by preprocessing 'dataset'.
    data_scale: RMS distance from it; used by preprocessing 'dataset'.
    extra: parameters of the nonlinearity's own, by name.
    target: of a transcoder, by name: `target_mean_D` and `target_scale` of
      what is reconstructed, and with a skip its map `w_skip_DD`.
  """

  w_enc_ND: jax.Array
  w_dec_ND: jax.Array
  b_lat_N: jax.Array
  b_pre_D: jax.Array
  data_mean_D: jax.Array
  data_scale: jax.Array
  extra: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
  target: dict[str, jax.Array] = flax.struct.field(default_factory=dict)


_FIELDS = tuple(
  field.name
  for field in dataclasses.fields(Sae)
  if field.name not in ('extra', 'target')
)
SKIP = 'w_skip_DD'
_TARGET = ('target_mean_D', 'target_scale', SKIP)
_TRAINED = ('w_enc_ND', 'w_dec_ND', 'b_lat_N', 'b_pre_D', SKIP)


def to_dict(sae: Sae) -> dict[str, jax.Array]:
  """All arrays by name, the nonlinearity's and a target's beside the others.

  These are the names in a checkpoint.
  """
  fields = {name: getattr(sae, name) for name in _FIELDS}
  return fields | sae.extra | sae.target


def from_dict(arrays: dict[str, jax.Array]) -> Sae:
  """The inverse of `to_dict`; arrays that it does not know are `extra`."""
  fields = {name: arrays[name] for name in _FIELDS}
  target = {name: a for name, a in arrays.items() if name in _TARGET}
  extra = {n: a for n, a in arrays.items() if n not in fields | target}
  return Sae(**fields, extra=extra, target=target)


def with_arrays(sae: Sae, arrays: dict[str, jax.Array]) -> Sae:
  """The autoencoder with some of its arrays, by name, replaced."""
  return from_dict(to_dict(sae) | arrays)


def trained(sae: Sae) -> dict[str, jax.Array]:
  """The parameters that are trained, by name."""
  names = {*_TRAINED, *nonlinearity.trained_names()}
  return {name: a for name, a in to_dict(sae).items() if name in names}
