"""The largest of each of k groups of latents (EleutherAI's sparsify).

Latents n to n + N / k - 1, n a multiple of N / k, are a group: its largest
pre-activation is active if it is positive. Of equal ones the first is.
"""

import jax
import jax.numpy as jnp

from sae_jax import errors
from sae_jax.autoencoder import encoder, nonlinearity
from sae_jax.autoencoder.params import Sae, SaeConfig

TRAINED = ()
fit = nonlinearity.keep_fitted
follow = nonlinearity.keep
# k at the most; but which they are is no search for a top k.
active_per_token = nonlinearity.any_number


def extra(config: SaeConfig, dtype: jnp.dtype) -> dict[str, jax.Array]:
  """None; raises UserError if the groups are not of one size."""
  if config.n_latents % config.k:
    raise errors.UserError(
      f'groupmax has k {config.k} groups of one size, and {config.n_latents} '
      f'latents: use a multiple of {config.k}'
    )
  return nonlinearity.no_extra(config, dtype)


def codes(
  config: SaeConfig, sae: Sae, x_BD: jax.Array, axis: str | None
) -> tuple[jax.Array, jax.Array]:
  """Each group's largest pre-activation after a ReLU, of this shard."""
  pre_BN = encoder.pre_activations(config, sae, x_BD)
  is_largest_BN = largest(config, pre_BN, axis)
  return encoder.dense_codes(jnp.where(is_largest_BN, jax.nn.relu(pre_BN), 0))


def largest(
  config: SaeConfig, pre_BN: jax.Array, axis: str | None
) -> jax.Array:
  """Which pre-activations are the largest of their group, [B, N].

  Args:
    config: gives the number of groups, k.
    pre_BN: pre-activations of this shard's latents.
    axis: mesh axis of the latents, inside shard_map; a group may be on several
      shards.
  """
  pre_NB = jax.lax.stop_gradient(pre_BN).T
  first = 0 if axis is None else jax.lax.axis_index(axis) * len(pre_NB)
  latent_N = first + jnp.arange(len(pre_NB), dtype=jnp.int32)
  group_N = latent_N // (config.n_latents // config.k)

  def over_groups(reduce, values_NB):
    return reduce(values_NB, group_N, config.k, indices_are_sorted=True)

  most_GB = over_groups(jax.ops.segment_max, pre_NB)
  if axis is not None:
    most_GB = jax.lax.pmax(most_GB, axis)
  is_most_NB = pre_NB == most_GB[group_N]
  none = jnp.int32(config.n_latents)
  chosen_GB = over_groups(
    jax.ops.segment_min, jnp.where(is_most_NB, latent_N[:, None], none)
  )
  if axis is not None:
    chosen_GB = jax.lax.pmin(chosen_GB, axis)
  return (latent_N[:, None] == chosen_GB[group_N]).T
