"""Times the reducers of a scan beside the encoder's product of the same batch.

Prints one JSON line last: medians over the batches of milliseconds that passed,
and of this process's processor time, which other programs of the machine change
less. `first` is the first batch, in which every pair is among the best.

  python -m experiments.benchmarks.reducers --n=4096
"""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import config as config_lib
from sae_jax.cli import flags
from sae_jax.probing.scan import pairs as pairs_lib
from sae_jax.probing.scan import reducers


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(config_lib.Config):
  """The batches that are reduced."""

  n: int = config_lib.option(4096, 'number of latents, N', least=1)
  d: int = config_lib.option(576, 'width of the activations, D', least=1)
  b: int = config_lib.option(4096, 'tokens of a batch, B', least=1)
  k: int = config_lib.option(32, 'active latents of a token, K', least=1)
  m: int = config_lib.option(16, 'examples of a latent, M', least=1)
  batches: int = config_lib.option(24, 'number of batches', least=2)
  product_n: int = config_lib.option(
    4096, 'latents of the product that the times are compared with', least=1
  )


def codes(config: BenchmarkConfig, batch: int):
  """Random codes: the r-th latent fires as often as 1 / sqrt(r)."""
  rng = np.random.default_rng(batch)
  share_N = np.arange(1, config.n + 1) ** -0.5
  share_N = np.random.default_rng(0).permutation(share_N / share_N.sum())
  shape = config.b, config.k
  idx_BK = np.searchsorted(share_N.cumsum(), rng.random(shape))
  idx_BK = np.sort(np.minimum(idx_BK, config.n - 1).astype(np.int32), axis=1)
  active_BK = np.ones(shape, bool)
  active_BK[:, 1:] = np.diff(idx_BK) > 0
  vals_BK = rng.lognormal(size=shape).astype(np.float32)
  row_B = (batch * config.b + np.arange(config.b)).astype(np.uint32)
  rank_BK = np.broadcast_to(np.arange(config.k, dtype=np.int32), shape)
  return jax.device_put(
    (
      vals_BK,
      idx_BK,
      rank_BK,
      vals_BK / 2,
      np.zeros_like(row_B),
      row_B,
      (row_B // 100).astype(np.int32),
      active_BK,
    )
  )


def timed(times: list, function, *args):
  """The result; appends milliseconds that passed and of the processors."""
  before = time.perf_counter(), time.process_time()
  result = jax.block_until_ready(function(*args))
  after = time.perf_counter(), time.process_time()
  times.append([1e3 * (b - a) for a, b in zip(before, after)])
  return result


def main() -> None:
  """Measures and prints."""
  config = flags.read(BenchmarkConfig)
  kinds = {
    'statistics': reducers.Statistics(),
    'top': reducers.Top('top', config.m, group='document'),
    'random': reducers.Top('random', config.m, key='random'),
    'near': reducers.Top('near', config.m),
  }
  shapes = (config.b, config.d), (config.d, config.product_n)
  operands = [
    jax.random.normal(jax.random.key(i), shape)
    for i, shape in enumerate(shapes)
  ]
  functions = {
    'product': jax.jit(jnp.matmul),
    'pairs': jax.jit(pairs_lib.pairs, static_argnums=8),
    'slots': jax.jit(pairs_lib.slots, static_argnums=8),
    **{k: jax.jit(of.update, donate_argnums=0) for k, of in kinds.items()},
  }
  states = {name: of.init(config.n) for name, of in kinds.items()}
  # Compiles; what it reduces is of no interest.
  batch = codes(config, 0)
  pairs = functions['pairs'](*batch, config.n)
  slots = functions['slots'](*batch, config.n)
  jax.block_until_ready(functions['product'](*operands))
  for name, of in kinds.items():
    given = slots if name == 'near' else pairs
    jax.block_until_ready(functions[name](of.init(config.n), given))

  times = {name: [] for name in functions}
  for i in range(config.batches):
    batch = codes(config, i)
    timed(times['product'], functions['product'], *operands)
    pairs = timed(times['pairs'], functions['pairs'], *batch, config.n)
    slots = timed(times['slots'], functions['slots'], *batch, config.n)
    for name in kinds:
      given = slots if name == 'near' else pairs
      states[name] = timed(times[name], functions[name], states[name], given)
  result = {'config': dataclasses.asdict(config)}
  for name, of in times.items():
    passed, processors = np.median(of[1:], axis=0)
    result[name] = {
      'ms': round(passed, 2),
      'processor_ms': round(processors, 2),
      'first_ms': round(of[0][0], 2),
    }
  print(json.dumps(result))


if __name__ == '__main__':
  flags.define(BenchmarkConfig)
  flags.run(main, __doc__)
