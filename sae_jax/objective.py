"""What training minimises: the reconstruction error and AuxK."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from sae_jax import autoencoder, sparse
from sae_jax import config as config_lib
from sae_jax.sparse import varying


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(config_lib.Config):
  """Terms of the loss (Gao et al. 2024, sections 2.3 and A.2)."""

  k_aux: int = config_lib.option(
    256,
    'dead latents that model the error of a token (AuxK); 0 for none',
    least=0,
  )
  aux_weight: float = config_lib.option(1 / 32, "AuxK's weight, alpha", least=0)
  dead_after_tokens: int = config_lib.option(
    10_000_000,
    'a latent that was silent for so many tokens is dead',
    least=1,
    most=2**30,
  )


@flax.struct.dataclass
class Terms:
  """What the objective saw, summed over the whole batch.

  Attributes:
    nmse: mean squared error over the mean predictor's, which is a constant.
    aux: AuxK's normalised error, 0 where no latent is dead.
    l0: mean number of active latents per token.
    fired_N: whether a latent was active for any token of the batch.
  """

  nmse: jax.Array
  aux: jax.Array
  l0: jax.Array
  fired_N: jax.Array


def _sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  return jax.lax.psum(x, axes) if axes else x


def aux_error(
  sae: autoencoder.Sae,
  x_BD: jax.Array,
  error_BD: jax.Array,
  dead_N: jax.Array,
  k_aux: int,
  *,
  data_axis: str | None = None,
  latent_axis: str | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """AuxK: how badly the top dead latents model the reconstruction's error.

  ||e - W_dec z_aux||^2 / ||e||^2 over the batch, with z_aux = ReLU of the
  k_aux largest pre-activations among dead latents and no bias. Its gradient
  reaches the dead latents alone: e is a constant and so are b_pre's shifts.

  Args:
    sae: the autoencoder, or this shard of it.
    x_BD: preprocessed activations.
    error_BD: e = x - x^, detached by this function.
    dead_N: which latents are dead.
    k_aux: how many of them are used for each token.
    data_axis: mesh axis of the tokens, inside shard_map.
    latent_axis: mesh axis of the latents, inside shard_map.
    implementation: see `sparse.decode`.

  Returns:
    The ratio, a scalar; 0 where it is not finite.
  """
  error_BD = jax.lax.stop_gradient(error_BD)
  n_latents = sae.w_enc_ND.shape[0]
  shards = jax.lax.axis_size(latent_axis) if latent_axis else 1
  vals_BK, idx_BK = sparse.encode_topk(
    jax.lax.stop_gradient(x_BD - sae.b_pre_D),
    sae.w_enc_ND,
    sae.b_lat_N,
    min(k_aux, n_latents),
    mask_N=dead_N,
    implementation=implementation,
  )
  vals_BK = sparse.global_top_k(
    vals_BK, latent_axis, min(k_aux, n_latents * shards), -jnp.inf
  )
  model_BD = sparse.decode(
    jax.nn.relu(vals_BK), idx_BK, sae.w_dec_ND, implementation=implementation
  )
  if latent_axis is not None:
    model_BD = jax.lax.psum(model_BD, latent_axis)
  axes = (data_axis,) if data_axis else ()
  total = _sum((error_BD**2).sum(), axes)
  size = _sum(jax.lax.stop_gradient(model_BD**2).sum(), axes)
  usable = jnp.isfinite(total) & jnp.isfinite(size) & (total > 0)
  # Selected before the difference too: a gradient of 0 * inf would be NaN.
  missed_BD = jnp.where(usable, error_BD, 0) - jnp.where(usable, model_BD, 0)
  return _sum((missed_BD**2).sum(), axes) / jnp.where(usable, total, 1)


def loss(
  sae: autoencoder.Sae,
  x_BD: jax.Array,
  dead_N: jax.Array,
  mse_of_mean: jax.Array,
  sae_config: autoencoder.SaeConfig,
  config: ObjectiveConfig,
  *,
  data_axis: str | None = None,
  latent_axis: str | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, Terms]:
  """NMSE + alpha AuxK over a batch (Gao et al. 2024, section A.2).

  Inside `jax.shard_map` the arguments are one shard's and the result is the
  whole batch's; gradients of replicated parameters come out summed.

  Args:
    sae: the autoencoder, or this shard of it.
    x_BD: preprocessed activations.
    dead_N: which latents are dead.
    mse_of_mean: squared error of the mean predictor per token, a constant
      measured on a sample at the start of training.
    sae_config: the autoencoder's config.
    config: the terms.
    data_axis: mesh axis of the tokens, inside shard_map.
    latent_axis: mesh axis of the latents, inside shard_map.
    implementation: of the sparse products, see `sparse.decode`.

  Returns:
    The loss and its terms.
  """
  data_axes = (data_axis,) if data_axis else ()
  tokens = x_BD.shape[0] * (jax.lax.axis_size(data_axis) if data_axis else 1)
  vals_BK, idx_BK = autoencoder.encode(
    sae_config, sae, x_BD, axis=latent_axis, implementation=implementation
  )
  output_BD = autoencoder.decode(
    sae, vals_BK, idx_BK, axis=latent_axis, implementation=implementation
  )
  error_BD = x_BD - output_BD
  nmse = _sum((error_BD**2).sum(), data_axes) / tokens / mse_of_mean

  active_BK = vals_BK > 0
  all_axes = data_axes + ((latent_axis,) if latent_axis else ())
  fired_N = varying.zeros(dead_N.shape, jnp.int32, vals_BK, idx_BK)
  fired_N = fired_N.at[idx_BK.reshape(-1)].max(
    active_BK.reshape(-1).astype(jnp.int32)
  )
  fired_N = _sum(fired_N, data_axes) > 0
  l0 = _sum(active_BK.sum(), all_axes) / tokens

  aux = jnp.zeros((), nmse.dtype)
  if config.k_aux:
    any_dead = _sum(
      dead_N.any().astype(jnp.int32), (latent_axis,) if latent_axis else ()
    )
    aux = jax.lax.cond(
      any_dead > 0,
      lambda: aux_error(
        sae,
        x_BD,
        error_BD,
        dead_N,
        config.k_aux,
        data_axis=data_axis,
        latent_axis=latent_axis,
        implementation=implementation,
      ),
      lambda: jnp.zeros((), nmse.dtype),
    )
  terms = Terms(nmse=nmse, aux=aux, l0=l0.astype(nmse.dtype), fired_N=fired_N)
  return nmse + config.aux_weight * aux, terms
