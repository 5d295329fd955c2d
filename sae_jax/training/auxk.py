"""AuxK: dead latents learn to model what the living ones miss."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from sae_jax import ops
from sae_jax.autoencoder import Sae
from sae_jax.ops import scopes, varying
from sae_jax.tpu import target
from sae_jax.training import shards as shards_lib

# The rows of dead latents are copied: to the least size of `_sizes` that holds
# them all. Each size is a branch of the program and takes the TPU compiler half
# a minute.
LEAST_SIZE = 256
_GROWTH = {'cpu': 4, 'tpu': 16}
# Most bytes of the copy's pre-activations at a time, if the rest of the step
# uses kernels.
_MICRO_BATCH_BYTES = 2**28
# Least ratio of the copy's size to k_aux from which kernels are used. Below it
# a dense product is less work than moving rows, and its pre-activations are
# few.
_KERNEL_FROM_RATIO = 64


def _sizes(n_latents: int) -> list[int]:
  """The sizes that a copy may have; the last holds all latents."""
  growth = _GROWTH.get(target.platform(), 16)
  sizes = [LEAST_SIZE]
  while sizes[-1] < n_latents:
    sizes.append(growth * sizes[-1])
  return [*sizes[:-1], n_latents]


@dataclasses.dataclass(frozen=True)
class Aux:
  """AuxK's settings.

  Attributes:
    k: dead latents that model the error of a token, k_aux.
    weight: alpha.
    dtype: of the factors of dense products, see `ops.matmul`.
    implementation: see `ops.decode`.
  """

  k: int
  weight: float
  dtype: jnp.dtype | None = None
  implementation: str | None = None


@flax.struct.dataclass
class _Rows:
  """The rows of some latents."""

  w_enc_MD: jax.Array
  w_dec_MD: jax.Array
  b_lat_M: jax.Array


@jax.named_scope(scopes.AUXK)
def add_gradient(
  aux: Aux,
  sae: Sae,
  grads: Sae,
  x_BD: jax.Array,
  error_BD: jax.Array,
  dead_N: jax.Array,
  shards: shards_lib.Shards,
) -> tuple[jax.Array, Sae]:
  """`aux_error` on a copy of the dead latents; nothing if none is dead.

  Args:
    aux: k_aux and the weight.
    sae: the autoencoder, or this shard of it, whose b_pre is what the encoder
      subtracts.
    grads: the other terms' gradients, of this device's tokens.
    x_BD: preprocessed activations.
    error_BD: e = x - x^, a constant.
    dead_N: which latents are dead.
    shards: of the batch.

  Returns:
    AuxK's error, a scalar, and grads with its gradient added.
  """
  n_latents = dead_N.shape[0]
  sizes = _sizes(n_latents)
  # All shards must take the same branch, since it contains collectives.
  dead = dead_N.sum()
  if shards.latent_axis is not None:
    dead = jax.lax.pmax(dead, shards.latent_axis)

  def branch(size):
    return lambda grads: aux_error(
      aux, sae, grads, x_BD, error_BD, dead_N, size, shards
    )

  def none(grads):
    return jnp.zeros((), x_BD.dtype), grads

  fitting = jnp.searchsorted(jnp.array(sizes), dead)
  return jax.lax.switch(
    jnp.where(dead > 0, fitting + 1, 0), [none, *map(branch, sizes)], grads
  )


def aux_error(
  aux: Aux,
  sae: Sae,
  grads: Sae,
  x_BD: jax.Array,
  error_BD: jax.Array,
  dead_N: jax.Array,
  size: int,
  shards: shards_lib.Shards,
) -> tuple[jax.Array, Sae]:
  """How badly the top dead latents model the reconstruction's error.

  ||e - W_dec z_aux||^2 / ||e||^2 over the batch, with z_aux = ReLU of the
  k_aux largest pre-activations among dead latents and no bias (Gao et al.
  2024, section A.2). e is a constant, and so is b_pre here: the gradient
  reaches the dead latents' rows and biases alone.

  Args:
    aux: k_aux and the weight.
    sae: the autoencoder, or this shard of it.
    grads: the other terms' gradients, of this device's tokens.
    x_BD: preprocessed activations.
    error_BD: e = x - x^, a constant.
    dead_N: which latents are dead; at least one on some shard.
    size: latents of the copy, static; at least as many as are dead on any
      shard.
    shards: of the batch.

  Returns:
    The ratio, and grads with the weight times its gradient added. A ratio that
    is not finite counts as 0 and adds nothing.
  """
  # Unused places of the copy get numbers past all latents, in order too, so
  # that the scatter into the gradients needs no sort.
  n_latents, number_M = dead_N.shape[0], jnp.arange(size)
  real_M = number_M < dead_N.sum()
  place_M = jnp.nonzero(dead_N, size=size, fill_value=0)[0]
  place_M = jnp.where(real_M, place_M, n_latents + number_M)
  rows = _Rows(
    w_enc_MD=sae.w_enc_ND.at[place_M].get(mode='clip'),
    w_dec_MD=sae.w_dec_ND.at[place_M].get(mode='clip'),
    b_lat_M=sae.b_lat_N.at[place_M].get(mode='clip'),
  )

  implementation = aux.implementation
  batch, total_size = x_BD.shape[0], size * shards.latent_shards
  if implementation == 'pallas':
    kernels = size >= _KERNEL_FROM_RATIO * aux.k
    implementation = 'pallas' if kernels else 'dense'
    least = (
      ops.least_micro_batches(batch, aux.k)
      if kernels
      else batch * size * 4 // _MICRO_BATCH_BYTES
    )
    shards = shards.with_micro_batches(batch, least)

  def missed(rows: _Rows, x_BD, error_BD):
    coded = ops.autoencode(
      x_BD,
      rows.w_enc_MD,
      rows.b_lat_M,
      rows.w_dec_MD,
      (min(aux.k, total_size),),
      b_pre_D=jax.lax.stop_gradient(sae.b_pre_D),
      mask_N=real_M,
      axis=shards.latent_axis,
      dtype=aux.dtype,
      implementation=implementation,
    )
    (model_BD,) = coded.models
    return ((error_BD - shards.over_latents(model_BD)) ** 2).sum()

  def run(x_BD, error_BD):
    return jax.value_and_grad(missed)(rows, x_BD, error_BD), ()

  start = (
    varying.zeros((), x_BD.dtype, error_BD),
    shards_lib.zeros_like(rows, x_BD),
  )
  (total, rows_grads), _ = shards.fold(run, start, x_BD, error_BD)
  total = shards.over_tokens(total)
  norm = shards.over_tokens((error_BD**2).sum())
  usable = jnp.isfinite(total) & jnp.isfinite(norm) & (norm > 0)
  norm = jnp.where(usable, norm, 1)

  def add(grad, rows_grad):
    dead = real_M.reshape(-1, *[1] * (rows_grad.ndim - 1)) & usable
    return grad.at[place_M].add(
      jnp.where(dead, aux.weight / norm * rows_grad, 0),
      mode='drop',
      unique_indices=True,
      indices_are_sorted=True,
    )

  grads = grads.replace(
    w_enc_ND=add(grads.w_enc_ND, rows_grads.w_enc_MD),
    w_dec_ND=add(grads.w_dec_ND, rows_grads.w_dec_MD),
    b_lat_N=add(grads.b_lat_N, rows_grads.b_lat_M),
  )
  return jnp.where(usable, total, 0) / norm, grads
