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
  # optax has the decay in the parameters' precision and the weight of a new
  # value, 1 - decay, in 64 bits. The weights' sum is computed from just those.
  rounded = float(np.asarray(decay, jax.tree.leaves(sums)[0].dtype))
  steps = count.astype(jnp.result_type(float))
  share = (1 - decay) / (1 - rounded)
  any_steps = count > 0
  weight = jnp.where(
    any_steps, -share * jnp.expm1(steps * math.log(rounded)), 1
  )
  current = params.to_dict(sae)
  return params.with_arrays(
    sae,
    {
      name: jnp.where(any_steps, (a / weight).astype(a.dtype), current[name])
      for name, a in sums.items()
    },
  )
