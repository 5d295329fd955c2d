"""Reads the moving average of the parameters."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.autoencoder import params
from sae_jax.autoencoder.params import Sae


def averaged(
  sae: Sae, sums: dict[str, jax.Array], count: jax.Array, decay: float
) -> Sae:
  """The moving average, bias-corrected as Adam's moments are.

  Args:
    sae: the current parameters, from which those are taken, to the bit, that
      are not trained or frozen.
    sums: the undebiased average of each of the others, by name.
    count: steps that were averaged; before the first step, or if all were
      skipped, the average is the current parameters.
    decay: the decay of the average per step; with 0 the average is the current
      parameters.
  """
  if not decay:
    return sae
  any_steps = count > 0
  current = params.to_dict(sae)

  def average(name, a):
    weight = jnp.where(any_steps, sum_of_weights(count, decay, a.dtype), 1)
    return jnp.where(any_steps, corrected(a, weight), current[name])

  return params.with_arrays(
    sae, {name: average(name, a) for name, a in sums.items()}
  )


def sum_of_weights(
  count: jax.Array, decay: float, dtype: jnp.dtype
) -> jax.Array:
  """What the weights of the values in an undebiased average add up to.

  Args:
    count: values that were averaged, 1 or more.
    decay: the decay of the average per step, more than 0.
    dtype: precision of the average.
  """
  # optax has the decay in the parameters' precision and the weight of a new
  # value, 1 - decay, in 64 bits. The weights' sum is computed from just those.
  rounded = float(np.asarray(decay, dtype))
  share = (1 - decay) / (1 - rounded)
  steps = count.astype(jnp.result_type(float))
  return -share * jnp.expm1(steps * math.log(rounded))


def corrected(sums: jax.Array, weight: jax.Array) -> jax.Array:
  """An average without its bias, from its `sum_of_weights`."""
  return (sums / weight).astype(sums.dtype)
