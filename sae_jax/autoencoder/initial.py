"""Initial weights, and fitting them to a sample of inputs."""

import jax
import jax.numpy as jnp

from sae_jax.autoencoder import metrics, model, nonlinearity, preprocessing
from sae_jax.autoencoder.params import Sae, SaeConfig
from sae_jax.ops import rows

_GAIN_TOKENS = 1024


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
  if config.encoder_init == 'independent':
    other = jax.random.fold_in(key, 1)
    w_enc_ND = rows.unit_rows(jax.random.normal(other, shape, dtype))
  return Sae(
    w_enc_ND=w_enc_ND,
    w_dec_ND=w_dec_ND,
    b_lat_N=jnp.zeros((config.n_latents,), dtype),
    b_pre_D=jnp.zeros((config.d_model,), dtype),
    data_mean_D=jnp.zeros((config.d_model,), dtype),
    data_scale=jnp.ones((), dtype),
    extra=nonlinearity.of(config.activation).extra(config, dtype),
  )


def fit_inputs(
  config: SaeConfig,
  sae: Sae,
  sample_BD: jax.Array,
  *,
  axis: str | None = None,
) -> tuple[Sae, jax.Array]:
  """Fits a fresh autoencoder to its inputs (Gao et al. 2024, appendix A.1).

  Sets the dataset's statistics, b_pre (the geometric median) and the
  nonlinearity's own parameters, and scales the encoder so that reconstructions
  have the norm of the inputs.

  Args:
    config: the autoencoder's config.
    sae: from `init_weights`, or this shard of it.
    sample_BD: raw activations; the paper's code takes 32,768 of them.
    axis: the mesh axis of the latents, inside shard_map.

  Returns:
    The autoencoder, and the squared error per token of predicting the mean of
    the preprocessed sample: the constant that NMSE divides by. It is 0 if the
    rows differ by no more than rounding.
  """
  mean_D = sample_BD.mean(0)
  sae = sae.replace(
    data_mean_D=mean_D,
    data_scale=jnp.sqrt(((sample_BD - mean_D) ** 2).sum(-1).mean()),
  )
  x_BD, affine = preprocessing.preprocess(config, sae, sample_BD)
  mse_of_mean = ((x_BD - x_BD.mean(0)) ** 2).sum(-1).mean()
  # Not by their mean, which rounding moves away from rows that are all equal.
  apart = ((x_BD - x_BD[0]) ** 2).sum()
  varies = apart > metrics.rounding(sample_BD / affine.scale).sum()
  mse_of_mean = jnp.where(varies, mse_of_mean, 0)
  sae = sae.replace(b_pre_D=geometric_median(x_BD))
  gain_BD = x_BD[:_GAIN_TOKENS]
  method = nonlinearity.of(config.activation)

  def fitted(sae):
    return sae.replace(
      extra=method.fit(config, sae, gain_BD, mse_of_mean, axis)
    )

  sae = fitted(sae)
  codes = model.encode(config, sae, gain_BD, axis=axis)
  output_BD = model.decode(sae, *codes, axis=axis, dtype=config.matmul_dtype)
  output_norm = jnp.linalg.norm(output_BD - sae.b_pre_D)
  gain = jnp.linalg.norm(gain_BD - sae.b_pre_D) / output_norm
  # Fitted once more: a threshold may be in units of the pre-activations.
  return fitted(sae.replace(w_enc_ND=gain * sae.w_enc_ND)), mse_of_mean
