"""Initial weights, and fitting them to a sample of inputs."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import errors, ops
from sae_jax.autoencoder import (
  encoder,
  metrics,
  model,
  nonlinearity,
  preprocessing,
)
from sae_jax.autoencoder.params import Sae, SaeConfig, SKIP
from sae_jax.ops import rows

_GAIN_TOKENS = 1024
# Directions of a smaller share of the largest variance are not stretched more.
_LEAST_VARIANCE = 1e-6
# Length of the random part of a row from the data. Equal tokens are frequent in
# text, and latents that begin equal would remain so.
_NOISE = 0.1


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
    max_steps: most steps of the iteration.

  Returns:
    The median, [D].
  """
  mean_D = points_BD.mean(0)
  spread = jnp.linalg.norm(points_BD - mean_D, axis=-1).mean()

  def step(carry):
    median_D, _, count = carry
    away_BD = points_BD - median_D
    distance_B = jnp.linalg.norm(away_BD, axis=-1)
    # In this precision a point this near is the same as the iterate.
    near_B = distance_B <= jnp.finfo(points_BD.dtype).eps * spread
    weight_B = jnp.where(near_B, 0, 1 / jnp.where(near_B, 1, distance_B))
    pull_D = weight_B @ away_BD
    pull = jnp.linalg.norm(pull_D)
    near = near_B.sum()
    share = jnp.where(pull > 0, jnp.maximum(0, 1 - near / pull), 0)
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
  """Random unit decoder rows, the encoder by `encoder_init`, zero biases.

  Under jit with output shardings each device computes only its own shard, and
  the values do not depend on the mesh.

  Args:
    config: the autoencoder's config.
    key: random key.
    dtype: of every array.
  """
  shape = (config.n_latents, config.d_model)
  w_dec_ND = rows.unit_rows(jax.random.normal(key, shape, dtype))
  # A copy, since the two are donated separately.
  w_enc_ND = jnp.copy(w_dec_ND)
  if config.encoder_init == 'independent' or config.target_site:
    other = jax.random.fold_in(key, 1)
    w_enc_ND = rows.unit_rows(jax.random.normal(other, shape, dtype))
  return Sae(
    w_enc_ND=w_enc_ND,
    w_dec_ND=w_dec_ND,
    b_lat_N=jnp.zeros((config.n_latents,), dtype),
    b_pre_D=jnp.zeros((config.d_model,), dtype),
    data_mean_D=jnp.zeros((config.d_model,), dtype),
    data_scale=jnp.ones((), dtype),
    target=_target(config, dtype),
    extra=nonlinearity.of(config.activation).extra(config, dtype),
  )


def _target(config: SaeConfig, dtype: jnp.dtype) -> dict[str, jax.Array]:
  """A transcoder's own arrays before they are fitted; see `Sae.target`."""
  if not config.target_site:
    return {}
  arrays = {
    'target_mean_D': jnp.zeros((config.d_model,), dtype),
    'target_scale': jnp.ones((), dtype),
  }
  if config.skip:
    arrays[SKIP] = jnp.zeros((config.d_model, config.d_model), dtype)
  return arrays


@flax.struct.dataclass
class DataStart:
  """What a decoder that starts from the data needs, see `data_start`.

  Arrays of the host, equal on every process.

  Attributes:
    chosen_N: which row each latent starts from, all different.
    whitening_DD: half whitening of what is reconstructed.
    read_whitening_DD: that of what is read, of a transcoder; else None.
  """

  chosen_N: np.ndarray
  whitening_DD: np.ndarray
  read_whitening_DD: np.ndarray | None = None


def data_start(
  config: SaeConfig, sample_BD: np.ndarray, seed: int
) -> DataStart:
  """Prepares a start from the data, on the host.

  There a permutation and the root of a matrix take seconds; compiling them for
  a TPU takes minutes.

  Args:
    config: the autoencoder's config.
    sample_BD: raw activations, at least as many as there are latents; of a
      transcoder [B, 2 D].
    seed: seed of the choice of rows.

  Raises:
    UserError: if there are fewer rows than latents.
  """
  if len(sample_BD) < config.n_latents:
    raise errors.UserError(
      f'{config.n_latents} latents cannot start from {len(sample_BD)} rows of '
      f'the data: use sample_rows {config.n_latents} or more, and a store of '
      'as many, or decoder_init random'
    )
  # The dataset's own mean and scale are no part of unit rows' directions.
  fresh = init_weights(
    dataclasses.replace(config, n_latents=config.k), jax.random.key(0)
  )
  tokens_BX, _ = jax.jit(preprocessing.tokens, static_argnums=0)(
    config, fresh, jnp.asarray(sample_BD)
  )
  x_BD, target_BD = preprocessing.halves(config, np.asarray(tokens_BX))
  order_B = np.random.default_rng(seed).permutation(len(sample_BD))
  return DataStart(
    order_B[: config.n_latents].astype(np.int32),
    half_whitening(target_BD),
    half_whitening(x_BD) if config.target_site else None,
  )


def half_whitening(x_BD: np.ndarray) -> np.ndarray:
  """C^(-1/4), [D, D] in float32, of the covariance C of some rows.

  Rows times it have variances that are the roots of what they were, so that a
  few large directions do not make all rows alike.
  """
  away_BD = x_BD - x_BD.mean(0, dtype=np.float64)
  variance_D, axes_DD = np.linalg.eigh(away_BD.T @ away_BD / len(x_BD))
  least = max(_LEAST_VARIANCE * variance_D[-1], np.finfo(np.float32).tiny)
  stretch_D = np.maximum(variance_D, least) ** -0.25
  return ((axes_DD * stretch_D) @ axes_DD.T).astype(np.float32)


def data_rows(
  random_ND: jax.Array,
  away_BD: jax.Array,
  chosen_N: np.ndarray,
  whitening_DD: np.ndarray,
  axis: str | None = None,
) -> jax.Array:
  """Unit rows from the data: different rows of x - b_pre.

  They are half whitened, with a random part a tenth as long. On held-out rows
  this did better than random directions in all runs of 0.2 to 4 million tokens,
  see docs/results.md.

  Args:
    random_ND: random unit rows, of this shard.
    away_BD: preprocessed activations less their centre, at least as many as
      all shards' latents.
    chosen_N: see `DataStart`.
    whitening_DD: see `DataStart`.
    axis: the mesh axis of the latents, inside shard_map.

  Returns:
    [N, D], the rows of this shard. Together they do not depend on the mesh.
  """
  # All rows are turned before any is chosen: products of one shape round alike
  # on every mesh.
  away_BD = ops.matmul(away_BD, whitening_DD)
  n_own = random_ND.shape[0]
  first = 0 if axis is None else jax.lax.axis_index(axis) * n_own
  chosen_N = jax.lax.dynamic_slice(jnp.asarray(chosen_N), (first,), (n_own,))
  unit_ND = rows.unit_rows(away_BD[chosen_N])
  return rows.unit_rows(unit_ND + _NOISE * random_ND)


def _mean(x_BD):
  return x_BD.mean(0)


def fit_inputs(
  config: SaeConfig,
  sae: Sae,
  sample_BD: jax.Array,
  start: DataStart | None = None,
  *,
  axis: str | None = None,
) -> tuple[Sae, jax.Array]:
  """Fits a fresh autoencoder to its inputs (Gao et al. 2024, appendix A.1).

  Sets the dataset's statistics, b_pre (the geometric median, or with bias_init
  'mean' the mean), the decoder with
  decoder_init 'data' and the nonlinearity's own parameters. Scales the encoder
  so that reconstructions have the norm of the inputs, as the paper's code does,
  or with encoder_gain 'least_squares' so that they are nearest to them. Where
  the encoder subtracts no b_pre, the latents' biases begin as if it subtracted
  the mean.

  Args:
    config: the autoencoder's config.
    sae: from `init_weights`, or this shard of it.
    sample_BD: raw activations, of a transcoder [B, 2 D]; the paper's code takes
      32,768 of them.
    start: from `data_start`, for decoder_init 'data'.
    axis: the mesh axis of the latents, inside shard_map.

  Returns:
    The autoencoder, and the squared error per token of predicting the mean of
    the preprocessed sample: the constant that NMSE divides by. It is 0 if the
    rows differ by no more than rounding.
  """
  read_BD, output_BD = preprocessing.halves(config, sample_BD)
  mean_D, scale = _statistics(read_BD)
  sae = sae.replace(data_mean_D=mean_D, data_scale=scale)
  if config.target_site:
    mean_D, scale = _statistics(output_BD)
    # Of the length of what is read, so that weights need none of their own.
    _, length = _statistics(preprocessing.preprocess(config, sae, read_BD)[0])
    scale = scale / jnp.where(length > 0, length, 1)
    statistics = {'target_mean_D': mean_D, 'target_scale': scale}
    sae = sae.replace(target=sae.target | statistics)
  tokens_BX, affine = preprocessing.tokens(config, sae, sample_BD)
  x_BD, target_BD = preprocessing.halves(config, tokens_BX)
  mse_of_mean = ((target_BD - target_BD.mean(0)) ** 2).sum(-1).mean()
  # Not by their mean, which rounding moves away from rows that are all equal.
  apart = ((target_BD - target_BD[0]) ** 2).sum()
  varies = apart > metrics.rounding(output_BD / affine.scale).sum()
  mse_of_mean = jnp.where(varies, mse_of_mean, 0)
  center = geometric_median if config.bias_init == 'median' else _mean
  sae = sae.replace(b_pre_D=center(target_BD))
  if start is not None:
    sae = _from_data(config, sae, x_BD, target_BD, start, axis)
  if not encoder.has_input_bias(config):
    sae = sae.replace(b_lat_N=-(sae.w_enc_ND @ x_BD.mean(0)))
  gain_BD, away_BD = x_BD[:_GAIN_TOKENS], target_BD[:_GAIN_TOKENS]
  method = nonlinearity.of(config.activation)

  def fitted(sae):
    return sae.replace(
      extra=method.fit(config, sae, gain_BD, mse_of_mean, axis)
    )

  sae = fitted(sae)
  codes = model.encode(config, sae, gain_BD, axis=axis)
  output_BD = model.decode(sae, *codes, axis=axis, dtype=config.matmul_dtype)
  model_BD, away_BD = output_BD - sae.b_pre_D, away_BD - sae.b_pre_D
  squares = (model_BD**2).sum()
  if config.encoder_gain == 'least_squares':
    # Codes are proportional to the encoder's length, or nearly so.
    gain = (away_BD * model_BD).sum() / squares
  else:
    gain = jnp.sqrt((away_BD**2).sum() / squares)
  sae = sae.replace(w_enc_ND=gain * sae.w_enc_ND, b_lat_N=gain * sae.b_lat_N)
  # Fitted once more: a threshold may be in units of the pre-activations.
  return fitted(sae), mse_of_mean


def _statistics(raw_BD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The mean of rows and their RMS distance from it."""
  mean_D = raw_BD.mean(0)
  return mean_D, jnp.sqrt(((raw_BD - mean_D) ** 2).sum(-1).mean())


def _from_data(config, sae, x_BD, target_BD, start, axis) -> Sae:
  """The autoencoder with rows from the data, see `data_rows`."""
  w_dec_ND = data_rows(
    sae.w_dec_ND,
    target_BD - sae.b_pre_D,
    start.chosen_N,
    start.whitening_DD,
    axis,
  )
  sae = sae.replace(w_dec_ND=w_dec_ND)
  if config.target_site:
    # Of the same tokens, so that a latent writes what goes with what it reads.
    w_enc_ND = data_rows(
      sae.w_enc_ND,
      x_BD - x_BD.mean(0),
      start.chosen_N,
      start.read_whitening_DD,
      axis,
    )
    return sae.replace(w_enc_ND=w_enc_ND)
  if config.encoder_init == 'transposed':
    sae = sae.replace(w_enc_ND=w_dec_ND)
  return sae
