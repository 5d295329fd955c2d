"""Times the whole training step and each of its parts on this machine.

Prints one JSON line last: seconds of the step (median and least of --steps,
after warm-up, each waited for), of its parts run alone (least of --steps), and
the peak memory of the process. `encoder_matmul_s` is the product x W_enc^T
alone, which no exact autoencoder can do without; `step_over_matmul` sets the
step beside it. Parts run alone need not add up to the step.

  python -m experiments.benchmarks.train --d=768 --n=32768 --k=32 --batch=4096

Beside it, `torch_trainers.py` prints the same of public PyTorch trainers.
"""

import dataclasses
import json
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import autoencoder, mesh, ops
from sae_jax import config as config_lib
from sae_jax.cli import flags, huge_pages
from sae_jax.training import optimizer, step
from sae_jax.training import state as state_lib
from sae_jax.training.config import TrainConfig

_WARM_UP = 2


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(config_lib.Config):
  """The shape that is timed."""

  d: int = config_lib.option(768, 'width of the activations, D', least=1)
  n: int = config_lib.option(32_768, 'number of latents, N', least=1)
  k: int = config_lib.option(
    32, 'number of active latents of a token, K', least=1
  )
  batch: int = config_lib.option(4096, 'number of tokens in a step, B', least=1)
  steps: int = config_lib.option(8, 'number of steps that are timed', least=1)


def _seconds(run, *args, times: int) -> list[float]:
  """Seconds of each run, after one more that compiles."""
  jax.block_until_ready(run(*args))
  seconds = []
  for _ in range(times):
    began = time.perf_counter()
    jax.block_until_ready(run(*args))
    seconds.append(time.perf_counter() - began)
  return seconds


def _backward(vals_BK, idx_BK, x_BD, g_BD, w_dec_ND):
  """The values' gradient and both weight gradients of a reconstruction."""
  _, back = jax.vjp(
    lambda vals_BK, w_ND: ops.decode(vals_BK, idx_BK, w_ND),
    vals_BK,
    w_dec_ND,
  )
  vals_grad_BK, dec_grad_ND = back(g_BD)
  enc_grad_ND = ops.weight_grad(vals_grad_BK, idx_BK, x_BD, len(w_dec_ND))
  return dec_grad_ND, enc_grad_ND


def parts(
  config: TrainConfig,
  sae: autoencoder.Sae,
  x_BD: jax.Array,
  times: int,
) -> dict[str, float]:
  """Least seconds of each part of a step, run alone."""

  def least(run, *args):
    return min(_seconds(run, *args, times=times))

  product = jax.jit(lambda x_BD, w_ND: ops.matmul(x_BD, w_ND.T))
  pre_BN = product(x_BD, sae.w_enc_ND)
  select = jax.jit(lambda pre_BN: ops.top_k(pre_BN, config.sae.k))
  vals_BK, idx_BK = select(pre_BN)
  least_s = {
    'encoder_matmul_s': least(product, x_BD, sae.w_enc_ND),
    'topk_s': least(select, pre_BN),
  }
  del pre_BN
  pairs = (vals_BK, idx_BK)
  least_s['decode_s'] = least(jax.jit(ops.decode), *pairs, sae.w_dec_ND)
  least_s['backward_s'] = least(
    jax.jit(_backward), *pairs, x_BD, x_BD, sae.w_dec_ND
  )
  update = jax.jit(
    lambda state, grads: optimizer.update(
      config.optimizer, *state, grads, jnp.float32(1e-4)
    ),
    donate_argnums=0,
  )
  # Donated, as in the step: every run takes the state of the one before.
  grads = jax.tree.map(lambda a: a + 1e-3, sae)
  state = (sae, optimizer.init(config.optimizer, sae))
  seconds = []
  for _ in range(times + 1):
    began = time.perf_counter()
    *state, _ = jax.block_until_ready(update(tuple(state), grads))
    seconds.append(time.perf_counter() - began)
  least_s['optimizer_s'] = min(seconds[1:])
  return least_s


def measure(shape: BenchmarkConfig) -> dict:
  """Times of the step and its parts at one shape."""
  d, n, k, batch, steps = dataclasses.astuple(shape)
  config = TrainConfig(
    sae=autoencoder.SaeConfig(d_model=d, n_latents=n, k=k),
    batch_size=batch,
    steps=steps + _WARM_UP,
  )
  devices = mesh.make_mesh(config.mesh_data, config.mesh_latent)
  rows_BD = np.random.default_rng(0).standard_normal((batch, d), np.float32)
  state = state_lib.init_state(config, devices, rows_BD[:1024])
  raw_BD = jax.device_put(rows_BD, mesh.sharding(devices, 'BD'))
  do = step.make_step(config, devices)
  seconds = []
  for _ in range(_WARM_UP + steps):
    began = time.perf_counter()
    state, values = jax.block_until_ready(do(state, raw_BD))
    seconds.append(time.perf_counter() - began)
  # Of the step alone: the parts below hold all pre-activations.
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  seconds = seconds[_WARM_UP:]
  sae = state.sae
  x_BD, _ = autoencoder.preprocess(config.sae, sae, raw_BD)
  del state
  alone = parts(config, sae, x_BD, steps)
  median = statistics.median(seconds)
  return {
    'd': d,
    'n': n,
    'k': k,
    'batch': batch,
    'device': jax.devices()[0].device_kind,
    'step_s_median': round(median, 4),
    'step_s_min': round(min(seconds), 4),
    **{name: round(value, 4) for name, value in alone.items()},
    'step_over_matmul': round(min(seconds) / alone['encoder_matmul_s'], 3),
    'peak_memory_gib': round(peak, 3),
    'tokens_per_s': round(batch / median, 1),
    'loss': float(values['loss']),
  }


def main() -> None:
  """Entry point."""
  flags.define(BenchmarkConfig)
  flags.run(
    lambda: print(json.dumps(measure(flags.read(BenchmarkConfig)))), __doc__
  )


if __name__ == '__main__':
  huge_pages.use_huge_pages()
  main()
