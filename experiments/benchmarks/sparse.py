"""Times the sparse products against dense ones, for `ops/dispatch.py`.

For each N/K it runs decode, both its gradients and the encoder's weight
gradient by every implementation, in turn, and prints one JSON line: seconds
(the least of the repeats) and the ratio dense / gather, which is above 1 where
gathering is faster.

  python -m experiments.benchmarks.sparse --d=576 --n=4096 --batch=1024
"""

import json
import time

from absl import app, flags
import jax
import jax.numpy as jnp

from sae_jax import ops

_D = flags.DEFINE_integer('d', 576, 'activation width, D')
_N = flags.DEFINE_integer('n', 4096, 'latents, N')
_BATCH = flags.DEFINE_integer('batch', 1024, 'tokens, B')
_K = flags.DEFINE_list('k', ['512', '256', '128', '64', '32', '16'], 'values')
_REPEATS = flags.DEFINE_integer(
  'repeats', 5, 'timed runs of each implementation'
)

# Kernels are for a TPU: `kernels/table.py` has the figures of its compiler.
_IMPLEMENTATIONS = ('gather', 'dense')


def _products(implementation):
  """A jitted function that does all sparse products of a step."""

  # Indices are given: the encoder's matmul and top-k, which no implementation
  # changes, are left out.
  def products(x_BD, w_dec_ND, idx_BK):
    vals_BK = jnp.ones(idx_BK.shape, x_BD.dtype)
    out_BD, back = jax.vjp(
      lambda vals_BK, w_ND: ops.decode(
        vals_BK, idx_BK, w_ND, implementation=implementation
      ),
      vals_BK,
      w_dec_ND,
    )
    vals_grad_BK, dec_grad_ND = back(out_BD)
    enc_grad_ND = ops.weight_grad(
      vals_grad_BK, idx_BK, x_BD, len(w_dec_ND), implementation=implementation
    )
    return out_BD, dec_grad_ND, enc_grad_ND

  return jax.jit(products)


def measure(d: int, n: int, batch: int, k: int, repeats: int) -> dict:
  """Seconds of each implementation at one shape, and their ratio."""
  keys = jax.random.split(jax.random.key(0), 3)
  args = (
    jax.random.normal(keys[0], (batch, d)),
    jax.random.normal(keys[1], (n, d)),
    jax.lax.top_k(jax.random.normal(keys[2], (batch, n)), k)[1],
  )
  runs = {name: _products(name) for name in _IMPLEMENTATIONS}
  seconds = {name: [] for name in runs}
  for run in runs.values():
    jax.block_until_ready(run(*args))
  for _ in range(repeats):
    for name, run in runs.items():
      began = time.perf_counter()
      jax.block_until_ready(run(*args))
      seconds[name].append(time.perf_counter() - began)
  best = {name: min(times) for name, times in seconds.items()}
  return {
    'k': k,
    'n_over_k': n / k,
    **{f'{name}_s': round(value, 5) for name, value in best.items()},
    'dense_over_gather': round(best['dense'] / best['gather'], 2),
  }


def main(argv: list[str]) -> None:
  """Entry point."""
  del argv
  rows = [
    measure(_D.value, _N.value, _BATCH.value, int(k), _REPEATS.value)
    for k in _K.value
  ]
  shape = {'d': _D.value, 'n': _N.value, 'batch': _BATCH.value}
  device = jax.devices()[0].device_kind
  print(json.dumps({'device': device, **shape, 'rows': rows}))


if __name__ == '__main__':
  app.run(main)
