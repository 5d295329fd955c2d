"""Metrics of an autoencoder: NMSE, FVU, cosine, L0, density."""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.autoencoder import model, params, preprocessing

# Log10 of the share of tokens a latent fires on.
DENSITY_EDGES = np.linspace(-8.0, 0.0, 33)
# A deviation of this many times the rounding of what it was computed from may
# be nothing else.
_ROUNDINGS = 16


@flax.struct.dataclass
class Sums:
  """Sums over the tokens of one batch, from which all metrics follow.

  Attributes:
    tokens: number of tokens.
    error: sum of squared errors.
    x_D: sum of the preprocessed activations.
    square_D: sum of their squares.
    rounding: sum of the squares that rounding may give them.
    cosine: sum of cosines between x and x^.
    active: number of active latents.
    fired_N: number of tokens each latent fired on.
  """

  tokens: jax.Array
  error: jax.Array
  x_D: jax.Array
  square_D: jax.Array
  rounding: jax.Array
  cosine: jax.Array
  active: jax.Array
  fired_N: jax.Array


def rounding(computed_from_BD: jax.Array) -> jax.Array:
  """The squared distance between rows that rounding alone may cause, [B]."""
  eps = jnp.finfo(computed_from_BD.dtype).eps
  return (_ROUNDINGS * eps) ** 2 * (computed_from_BD**2).sum(-1)


def batch_sums(
  x_BD: jax.Array,
  output_BD: jax.Array,
  vals_BK: jax.Array,
  idx_BK: jax.Array,
  n_latents: int,
  origin_D: jax.Array,
  computed_from_BD: jax.Array,
) -> Sums:
  """Sums over one batch, in the space the autoencoder works in.

  Args:
    x_BD: preprocessed activations.
    output_BD: their reconstructions.
    vals_BK: values of the latents; positive ones are active.
    idx_BK: their indices.
    n_latents: N.
    origin_D: point subtracted from x before it is summed. Variances do not
      depend on it, but keep their digits in float32 if it is near the mean, as
      b_pre is.
    computed_from_BD: what x is the small difference of, in the same unit.
  """
  active_BK = vals_BK > 0
  shifted_BD = x_BD - origin_D
  product_B = (x_BD * output_BD).sum(-1)
  norms_B = jnp.linalg.norm(x_BD, axis=-1) * jnp.linalg.norm(output_BD, axis=-1)
  return Sums(
    tokens=jnp.array(x_BD.shape[0]),
    error=((x_BD - output_BD) ** 2).sum(),
    x_D=shifted_BD.sum(0),
    square_D=(shifted_BD**2).sum(0),
    rounding=rounding(computed_from_BD).sum(),
    cosine=(product_B / jnp.where(norms_B > 0, norms_B, 1)).sum(),
    # Two sums, since the pairs of a large batch may exceed an int32.
    active=active_BK.sum(-1).astype(x_BD.dtype).sum(),
    fired_N=jnp.zeros((n_latents,), jnp.int32)
    .at[idx_BK.reshape(-1)]
    .add(active_BK.reshape(-1).astype(jnp.int32)),
  )


def add_sums(total: Sums | None, batch: Sums) -> Sums:
  """Adds a batch's sums to a running total, on the host in 64 bits."""
  wide = jax.tree.map(
    lambda a: np.asarray(
      a, np.float64 if jnp.issubdtype(a.dtype, jnp.floating) else np.int64
    ),
    batch,
  )
  return wide if total is None else jax.tree.map(np.add, total, wide)


@dataclasses.dataclass(frozen=True)
class Metrics:
  """Metrics that follow from `Sums`.

  Attributes:
    nmse: mean squared error over a constant: the mean predictor's error on a
      sample at the start of training.
    fvu: fraction of variance unexplained: squared error over the squared
      distance from these tokens' own mean; NaN if that may be rounding alone.
    cosine: mean cosine between x and x^.
    l0: mean number of active latents per token.
    dead_fraction: share of latents that fired on none of these tokens.
    tokens: number of these tokens.
    density_N: share of these tokens each latent fired on.
  """

  nmse: float
  fvu: float
  cosine: float
  l0: float
  dead_fraction: float
  tokens: int
  density_N: np.ndarray

  def scalars(self) -> dict[str, float]:
    """The metrics that are one number, by name."""
    names = ('nmse', 'fvu', 'cosine', 'l0', 'dead_fraction', 'tokens')
    return {name: getattr(self, name) for name in names}


def summarise(sums: Sums, mse_of_mean: float) -> Metrics:
  """Metrics of all the tokens that were summed.

  Args:
    sums: totals from `add_sums`.
    mse_of_mean: the constant that NMSE divides by, per token.
  """
  tokens = float(sums.tokens)
  square = float(sums.square_D.sum())
  variance = square - float((sums.x_D**2).sum()) / tokens
  # Batches are summed in float32, whatever the totals are.
  least = float(sums.rounding) + _ROUNDINGS * np.finfo(np.float32).eps * square
  return Metrics(
    nmse=float(sums.error) / tokens / mse_of_mean,
    fvu=float(sums.error) / variance if variance > least else math.nan,
    cosine=float(sums.cosine) / tokens,
    l0=float(sums.active) / tokens,
    dead_fraction=float((sums.fired_N == 0).mean()),
    tokens=int(tokens),
    density_N=sums.fired_N / tokens,
  )


def density_histogram(density_N: np.ndarray) -> tuple[np.ndarray, int]:
  """Counts of log10 density in bins of DENSITY_EDGES, and the silent latents.

  Args:
    density_N: share of tokens each latent fires on.

  Returns:
    counts, [32], and the number of latents of density 0, which are in no bin.
  """
  live = density_N[density_N > 0]
  logs = np.clip(np.log10(live), DENSITY_EDGES[0], DENSITY_EDGES[-1])
  counts, _ = np.histogram(logs, DENSITY_EDGES)
  return counts, int((density_N == 0).sum())


def density_record(density_N: np.ndarray) -> dict[str, Any]:
  """`density_histogram` by name, as JSON has it."""
  counts, silent = density_histogram(density_N)
  return {
    'log10_edges': DENSITY_EDGES.tolist(),
    'latents': counts.tolist(),
    'silent': silent,
  }


def evaluate_batch(
  config: params.SaeConfig,
  sae: params.Sae,
  raw_BD: jax.Array,
  *,
  data_axis: str | None = None,
  latent_axis: str | None = None,
) -> Sums:
  """Preprocesses, encodes, decodes and sums one batch of raw activations.

  Args:
    config: the autoencoder's config.
    sae: the autoencoder, or this shard of it.
    raw_BD: raw activations, or this shard of them; of a transcoder [B, 2 D].
    data_axis: mesh axis of the tokens, inside shard_map.
    latent_axis: mesh axis of the latents, inside shard_map.

  Returns:
    Sums over the whole batch; `fired_N` of this shard's latents.
  """
  tokens_BX, affine = preprocessing.tokens(config, sae, raw_BD)
  x_BD, target_BD = preprocessing.halves(config, tokens_BX)
  _, raw_BD = preprocessing.halves(config, raw_BD)
  vals_BK, idx_BK = model.encode(config, sae, x_BD, axis=latent_axis)
  output_BD = model.decode(
    sae, vals_BK, idx_BK, axis=latent_axis, dtype=config.matmul_dtype
  )
  if config.skip:
    output_BD += preprocessing.skipped(config, sae, x_BD)
  sums = batch_sums(
    target_BD,
    output_BD,
    vals_BK,
    idx_BK,
    sae.w_enc_ND.shape[0],
    sae.b_pre_D,
    raw_BD / affine.scale,
  )
  if latent_axis is not None:
    sums = sums.replace(active=jax.lax.psum(sums.active, latent_axis))
  if data_axis is not None:
    shards = jax.lax.axis_size(data_axis)
    tokens = sums.tokens * shards
    sums = jax.lax.psum(sums.replace(tokens=0), data_axis)
    sums = sums.replace(tokens=tokens)
  return sums


METRIC_DEFINITIONS = {
  'space': 'activations after the preprocessing named in the sae config',
  'nmse': 'mean squared error per token / mse_of_mean, a constant: that of '
  'predicting the mean of a sample taken before training',
  'fvu': 'squared error / squared distance from the mean of the same tokens',
  'norm_ratio': 'mean of |reconstruction| / |activation|',
  'tied_rows': 'rows whose k-th and next value differ by no more than rounding,'
  ' so that another machine may choose another last latent',
  'by_position': 'the same metrics by position in the context',
  'tokens': 'masked ones (position 0, attention sinks) are in no metric',
}
