"""Whether directions are made of fewer others: an autoencoder of decoder rows.

The meta-autoencoder of Bussmann et al., "Showing SAE latents are not atomic
using meta-SAEs" (2024), with the sizes of SAEBench 0.6's meta_structure: a
quarter as many latents as rows, of which four are active for a row on average
(BatchTopK). Trained here by a loop of its own, to keep probing clear of
training.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

K, SHARE = 4, 4
_RATE = 5e-4


def left(
  rows_ND: np.ndarray, steps: int, batch_rows: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """What a meta-autoencoder leaves of each row.

  Args:
    rows_ND: directions, taken at unit length; rows of zeros stay so.
    steps: of Adam.
    batch_rows: rows of a step.
    rng: draws first weights and batches.

  Returns:
    Squared errors of the rows, and squared distances from their mean.
  """
  lengths_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
  unit_ND = rows_ND / np.where(lengths_N1 > 0, lengths_N1, 1)
  mean_D = unit_ND.mean(0)
  unit_ND = (unit_ND - mean_D).astype(np.float32)
  count = len(unit_ND)
  width = max(1, count // SHARE)
  size = min(batch_rows, count)
  # Rows themselves are directions to begin with, as short as their codes need.
  first_MD = unit_ND[rng.permutation(count)[:width]]
  params = {'encoder': first_MD, 'decoder': first_MD, 'bias': mean_D * 0}
  batches_SB = np.stack([rng.permutation(count)[:size] for _ in range(steps)])
  error_N = _trained(size, params, unit_ND, batches_SB)
  return np.asarray(error_N, np.float64), np.square(unit_ND, dtype='f8').sum(1)


@functools.partial(jax.jit, static_argnums=0)
def _trained(size, params, unit_ND, batches_SB):
  """Squared errors after Adam's steps."""
  optimizer = optax.adam(_RATE)

  def reconstructed(params, x_BD, least=None):
    pre_BM = jax.nn.relu((x_BD - params['bias']) @ params['encoder'].T)
    if least is None:
      flat = jax.lax.stop_gradient(pre_BM).reshape(-1)
      least = jax.lax.top_k(flat, min(K * len(x_BD), flat.size))[0][-1]
    z_BM = jnp.where(pre_BM >= least, pre_BM, 0)
    return z_BM @ params['decoder'] + params['bias'], least

  def step(carry, rows_B):
    params, state = carry
    x_BD = unit_ND[rows_B]

    def loss(params):
      new_BD, least = reconstructed(params, x_BD)
      return jnp.square(x_BD - new_BD).sum(1).mean(), least

    gradient, least = jax.grad(loss, has_aux=True)(params)
    updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(params, updates), state), least

  start = params, optimizer.init(params)
  (params, _), least_S = jax.lax.scan(step, start, batches_SB)
  # As at training, on average: the threshold of the last steps' batches.
  least = least_S[-min(50, len(least_S)) :].mean()

  def of_part(x_BD):
    new_BD, _ = reconstructed(params, x_BD, least)
    return jnp.square(x_BD - new_BD).sum(1)

  parts = -(-len(unit_ND) // size)
  padded_ND = jnp.pad(unit_ND, ((0, parts * size - len(unit_ND)), (0, 0)))
  error_GB = jax.lax.map(of_part, padded_ND.reshape(parts, size, -1))
  return error_GB.reshape(-1)[: len(unit_ND)]
