"""The TopK sparse autoencoder: its arrays and pure functions over them.

Every function works on a whole autoencoder or, inside `jax.shard_map` with
`axis` naming the mesh axis of the latents, on one shard of it.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from sae_jax import activation as activation_lib
from sae_jax import config as config_lib
from sae_jax import scopes, sparse, target

PREPROCESSING = ('none', 'center_unit_norm', 'layer_norm', 'dataset')
MATMULS = ('auto', 'float32', 'bfloat16')
_LAYER_NORM_EPS = 1e-5
_GAIN_TOKENS = 1024
# Of the preprocessed tokens' RMS distance from their mean.
_FIRST_THRESHOLD = 1e-3


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
    activation_lib.ACTIVATIONS,
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
      raise config_lib.UserError(
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


@flax.struct.dataclass
class Affine:
  """How a token was preprocessed: x = (raw - shift) / scale."""

  shift: jax.Array
  scale: jax.Array


@jax.named_scope(scopes.PREPROCESSING)
def preprocess(
  config: SaeConfig, sae: Sae, raw_BD: jax.Array
) -> tuple[jax.Array, Affine]:
  """Brings activations into the space the autoencoder works in.

  Args:
    config: names the preprocessing (Gao et al. 2024, section 2; layer_norm as
      in the code released with it).
    sae: holds the dataset's statistics.
    raw_BD: activations as the subject model has them.

  Returns:
    x_BD in the parameters' precision or that of `raw_BD`, if more, and what
    `restore` needs to undo it. A constant token becomes zero.
  """
  raw_BD = raw_BD.astype(jnp.result_type(raw_BD, sae.b_pre_D))
  if config.preprocessing == 'none':
    affine = Affine(jnp.zeros_like(raw_BD[:, :1]), jnp.ones_like(raw_BD[:, :1]))
  elif config.preprocessing == 'dataset':
    affine = Affine(
      jnp.broadcast_to(sae.data_mean_D, raw_BD.shape),
      jnp.broadcast_to(sae.data_scale, raw_BD[:, :1].shape),
    )
  else:
    shift_B1 = raw_BD.mean(-1, keepdims=True)
    centred_BD = raw_BD - shift_B1
    if config.preprocessing == 'center_unit_norm':
      norm_B1 = jnp.linalg.norm(centred_BD, axis=-1, keepdims=True)
      # Less is what the mean's own rounding leaves of a constant token.
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


def pre_activations(config: SaeConfig, sae: Sae, x_BD: jax.Array) -> jax.Array:
  """W_enc (x - b_pre) + b_lat of every latent, [B, N]."""
  x_BD = x_BD - sae.b_pre_D
  return sparse.matmul(x_BD, sae.w_enc_ND.T, config.matmul_dtype) + sae.b_lat_N


def candidates(
  config: SaeConfig,
  sae: Sae,
  x_BD: jax.Array,
  k: int,
  *,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """This shard's k largest pre-activations of each token, descending."""
  return sparse.encode_topk(
    x_BD,
    sae.w_enc_ND,
    sae.b_lat_N,
    min(k, sae.w_enc_ND.shape[0]),
    b_pre_D=sae.b_pre_D,
    dtype=config.matmul_dtype,
    implementation=implementation,
  )


def select(
  vals_BK: jax.Array, idx_BK: jax.Array, k: int, axis: str | None = None
) -> tuple[jax.Array, jax.Array]:
  """ReLU of those of all shards' `candidates` that are in the top k."""
  vals_BK, idx_BK = vals_BK[:, :k], idx_BK[:, :k]
  return jax.nn.relu(sparse.global_top_k(vals_BK, axis, k, 0.0)), idx_BK


def encode(
  config: SaeConfig,
  sae: Sae,
  x_BD: jax.Array,
  *,
  axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The active latents of each token as values and indices.

  z = ReLU(TopK(W_enc (x - b_pre) + b_lat)), or ReLU or JumpReLU without the
  TopK; those have no fixed number of active latents, so K is N for them.

  Args:
    config: gives k and the activation.
    sae: the autoencoder, or this shard of it.
    x_BD: preprocessed activations.
    axis: the mesh axis the latents are sharded over, inside shard_map.

  Returns:
    vals_BK (>= 0; a 0 is not active; descending with TopK) and idx_BK into
    this shard's latents. With TopK, over all shards at most K values of a
    token are positive: those that an unsharded autoencoder gives.
  """
  if config.activation == 'topk':
    return select(*candidates(config, sae, x_BD, config.k), config.k, axis)
  pre_BN = pre_activations(config, sae, x_BD)
  idx_BN = jnp.broadcast_to(
    jnp.arange(pre_BN.shape[1], dtype=jnp.int32), pre_BN.shape
  )
  if config.activation == 'relu':
    return jax.nn.relu(pre_BN), idx_BN
  return activation_lib.jump_relu(pre_BN, sae.log_threshold_N), idx_BN


def decode(
  sae: Sae,
  vals_BK: jax.Array,
  idx_BK: jax.Array,
  *,
  axis: str | None = None,
  dtype: jnp.dtype | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """x^ = W_dec z + b_pre, summed over the shards of the latents."""
  total_BD = sparse.decode(
    vals_BK, idx_BK, sae.w_dec_ND, dtype=dtype, implementation=implementation
  )
  if axis is not None:
    total_BD = jax.lax.psum(total_BD, axis)
  return total_BD + sae.b_pre_D


def reconstruct(config: SaeConfig, sae: Sae, raw_BD: jax.Array) -> jax.Array:
  """The raw activations as the autoencoder gives them back, [B, D]."""
  x_BD, affine = preprocess(config, sae, raw_BD)
  codes = encode(config, sae, x_BD)
  return restore(affine, decode(sae, *codes, dtype=config.matmul_dtype))


def unit_rows(w_ND: jax.Array) -> jax.Array:
  """Rows divided by their norms; a zero row stays zero."""
  norm_N1 = jnp.linalg.norm(w_ND, axis=-1, keepdims=True)
  return w_ND / jnp.where(norm_N1 > 0, norm_N1, 1)


def geometric_median(
  points_BD: jax.Array, *, tolerance: float = 1e-6, max_steps: int = 200
) -> jax.Array:
  """The point with the least sum of distances to the given ones.

  Weiszfeld's iteration in the form of Vardi and Zhang (2000), which is defined
  and converges where an iterate falls on a data point, duplicates included.

  Args:
    points_BD: the points.
    tolerance: stops when a step is shorter than this times the points' mean
      distance from their mean.
    max_steps: stops after so many steps.

  Returns:
    The median, [D].
  """
  mean_D = points_BD.mean(0)
  spread = jnp.linalg.norm(points_BD - mean_D, axis=-1).mean()

  def step(carry):
    median_D, _, count = carry
    away_BD = points_BD - median_D
    distance_B = jnp.linalg.norm(away_BD, axis=-1)
    # A point this near cannot be told from the iterate in this precision.
    near_B = distance_B <= jnp.finfo(points_BD.dtype).eps * spread
    weight_B = jnp.where(near_B, 0, 1 / jnp.where(near_B, 1, distance_B))
    pull_D = weight_B @ away_BD
    pull = jnp.linalg.norm(pull_D)
    held = near_B.sum()
    share = jnp.where(pull > 0, jnp.maximum(0, 1 - held / pull), 0)
    total = weight_B.sum()
    move_D = share * pull_D / jnp.where(total > 0, total, 1)
    return median_D + move_D, jnp.linalg.norm(move_D), count + 1

  def unfinished(carry):
    _, moved, count = carry
    return (moved > tolerance * spread) & (count < max_steps)

  start = (mean_D, jnp.array(jnp.inf, points_BD.dtype), jnp.array(0))
  return jax.lax.while_loop(unfinished, step, start)[0]


def init_weights(
  config: SaeConfig, key: jax.Array, dtype: jnp.dtype = jnp.float32
) -> Sae:
  """Random unit decoder rows, the encoder as the config says, zero biases.

  Under jit with output shardings each device makes its own part only, and
  the values do not depend on the mesh.

  Args:
    config: the autoencoder's config.
    key: random key.
    dtype: of every array.
  """
  shape = (config.n_latents, config.d_model)
  jumps = config.activation == 'jumprelu'
  w_dec_ND = unit_rows(jax.random.normal(key, shape, dtype))
  # A copy: the two are donated apart.
  w_enc_ND = jnp.copy(w_dec_ND)
  if config.encoder_init == 'independent':
    other = jax.random.fold_in(key, 1)
    w_enc_ND = unit_rows(jax.random.normal(other, shape, dtype))
  return Sae(
    w_enc_ND=w_enc_ND,
    w_dec_ND=w_dec_ND,
    b_lat_N=jnp.zeros((config.n_latents,), dtype),
    b_pre_D=jnp.zeros((config.d_model,), dtype),
    data_mean_D=jnp.zeros((config.d_model,), dtype),
    data_scale=jnp.ones((), dtype),
    log_threshold_N=jnp.zeros((config.n_latents,), dtype) if jumps else None,
  )


def fit_inputs(
  config: SaeConfig,
  sae: Sae,
  sample_BD: jax.Array,
  *,
  axis: str | None = None,
) -> tuple[Sae, jax.Array]:
  """Fits a fresh autoencoder to its inputs (Gao et al. 2024, appendix A.1).

  Sets the dataset's statistics, b_pre to the geometric median and JumpReLU's
  thresholds, and scales the encoder so that reconstructions have the norm of
  the inputs.

  Args:
    config: the autoencoder's config.
    sae: from `init_weights`, or this shard of it.
    sample_BD: raw activations; the paper's code takes 32,768 of them.
    axis: the mesh axis of the latents, inside shard_map.

  Returns:
    The autoencoder, and the squared error per token of predicting the mean of
    the preprocessed sample: the constant that NMSE divides by.
  """
  mean_D = sample_BD.mean(0)
  sae = sae.replace(
    data_mean_D=mean_D,
    data_scale=jnp.sqrt(((sample_BD - mean_D) ** 2).sum(-1).mean()),
  )
  x_BD, _ = preprocess(config, sae, sample_BD)
  mse_of_mean = ((x_BD - x_BD.mean(0)) ** 2).sum(-1).mean()
  sae = sae.replace(b_pre_D=geometric_median(x_BD))
  if sae.log_threshold_N is not None:
    first = jnp.log(_FIRST_THRESHOLD * jnp.sqrt(mse_of_mean))
    sae = sae.replace(log_threshold_N=sae.log_threshold_N + first)
  some_BD = x_BD[:_GAIN_TOKENS]
  codes = encode(config, sae, some_BD, axis=axis)
  output_BD = decode(sae, *codes, axis=axis, dtype=config.matmul_dtype)
  output_norm = jnp.linalg.norm(output_BD - sae.b_pre_D)
  gain = jnp.linalg.norm(some_BD - sae.b_pre_D) / output_norm
  return sae.replace(w_enc_ND=gain * sae.w_enc_ND), mse_of_mean
