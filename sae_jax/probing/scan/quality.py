"""Metrics of reconstructions, summed on the devices."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.autoencoder import metrics
from sae_jax.probing.scan import double
from sae_jax.probing.scan import sums as sums_lib
from sae_jax.probing.scan.double import Double


@flax.struct.dataclass
class Sums:
  """Sums over tokens; those that end in T are by position in the context.

  Whole numbers are exact up to 2**46. The fields of `metrics.Sums` mean the
  same here.

  Attributes:
    tokens_T: number of tokens.
    error_T: squared errors.
    cosine_T: cosines between x and x^.
    ratio_T: ratios of norms, |x^| / |x|; 0 where x is 0.
    active_T: active latents.
    x_D: sum of the preprocessed activations less `b_pre_D`.
    square_D: sum of their squares.
    rounding: sum of the squares that rounding may give them.
  """

  tokens_T: Double
  error_T: Double
  cosine_T: Double
  ratio_T: Double
  active_T: Double
  x_D: Double
  square_D: Double
  rounding: Double


def init(d_model: int, positions: int) -> Sums:
  """Sums over no token.

  Args:
    d_model: D.
    positions: of a context, T.
  """
  by_position = (double.zeros((positions,)) for _ in range(5))
  by_channel = (double.zeros((d_model,)) for _ in range(2))
  return Sums(*by_position, *by_channel, double.zeros(()))


def update(
  sums: Sums,
  x_ED: jax.Array,
  output_ED: jax.Array,
  active_E: jax.Array,
  origin_D: jax.Array,
  computed_from_ED: jax.Array,
  position_E: jax.Array,
  counts_E: jax.Array,
) -> Sums:
  """Adds tokens.

  Args:
    sums: the sums so far.
    x_ED: preprocessed activations.
    output_ED: their reconstructions.
    active_E: int32 number of active latents.
    origin_D: see `metrics.batch_sums`.
    computed_from_ED: see there.
    position_E: position in the context.
    counts_E: whether a token counts.
  """
  one_E = counts_E.astype(x_ED.dtype)
  shifted_ED = (x_ED - origin_D) * one_E[:, None]
  norm_E = jnp.linalg.norm(x_ED, axis=-1)
  output_norm_E = jnp.linalg.norm(output_ED, axis=-1)
  product_E = (x_ED * output_ED).sum(-1)
  both_E = norm_E * output_norm_E
  of_token_XE = jnp.stack(
    [
      jnp.ones_like(norm_E),
      ((x_ED - output_ED) ** 2).sum(-1),
      product_E / jnp.where(both_E > 0, both_E, 1),
      output_norm_E * jnp.where(norm_E > 0, 1 / norm_E, 0),
      active_E.astype(x_ED.dtype),
    ]
  )
  # A token that does not count may have any value.
  of_token_XE = jnp.where(counts_E, of_token_XE, 0)
  positions = sums.tokens_T.hi_N.shape[0]
  position_E = jnp.clip(position_E, 0, positions - 1)
  by_position_XT = (
    jnp.zeros((len(of_token_XE), positions), x_ED.dtype)
    .at[:, position_E]
    .add(of_token_XE)
  )
  rounding_E = jnp.where(counts_E, metrics.rounding(computed_from_ED), 0)
  # One sum of all columns: each is what it is alone, and fewer programs.
  of_token_EJ = [shifted_ED, shifted_ED**2, rounding_E[:, None]]
  total_J = sums_lib.total(jnp.concatenate(of_token_EJ, 1))
  d_model = x_ED.shape[1]

  def columns(first, stop):
    return jax.tree.map(lambda a: a[first:stop], total_J)

  new = Sums(
    *map(double.of, by_position_XT),
    columns(0, d_model),
    columns(d_model, 2 * d_model),
    jax.tree.map(lambda a: a[-1], total_J),
  )
  return sums_lib.add(sums, new)


def summarise(
  sums: Sums, fired_N: np.ndarray, mse_of_mean: float
) -> metrics.Metrics:
  """The metrics of all tokens.

  Args:
    sums: float64, from `sums_lib.to_host`.
    fired_N: number of tokens that each latent fired on.
    mse_of_mean: the constant that NMSE divides by.
  """
  plain = metrics.Sums(
    tokens=sums.tokens_T.sum(),
    error=sums.error_T.sum(),
    x_D=sums.x_D,
    square_D=sums.square_D,
    rounding=sums.rounding,
    cosine=sums.cosine_T.sum(),
    active=sums.active_T.sum(),
    fired_N=fired_N,
  )
  return metrics.summarise(plain, mse_of_mean)


def curves(sums: Sums, mse_of_mean: float) -> dict[str, np.ndarray]:
  """Metrics by position in the context, [T]; NaN where there is no token.

  Args:
    sums: float64, from `sums_lib.to_host`.
    mse_of_mean: the constant that NMSE divides by.
  """
  tokens_T = np.where(sums.tokens_T > 0, sums.tokens_T, np.nan)
  return {
    'tokens': sums.tokens_T.astype(np.int64),
    'nmse': sums.error_T / tokens_T / mse_of_mean,
    'cosine': sums.cosine_T / tokens_T,
    'l0': sums.active_T / tokens_T,
    'norm_ratio': sums.ratio_T / tokens_T,
  }
