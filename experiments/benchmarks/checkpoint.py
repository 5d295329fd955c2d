"""Saving and loading a checkpoint: the price of checksums, and the memory.

Prints one JSON line last. In one process, by turns and --repeats times each, a
checkpoint of an autoencoder's state is saved and read as a run does, without
checksums, as older versions did, and with them. `save_ratio` and
`load_ratio` are the medians of the ratios of each repeat, of the time that
passed; `save_cpu_ratio` and `load_cpu_ratio` of this process's processor time,
which other programs of the machine change less. `load_peak` is the peak of
memory of `checkpoint.load` in a new process, as a multiple of the bytes of the
autoencoder that it gives: of the average, and of the last parameters.

  python -m experiments.benchmarks.checkpoint --workdir=runs/checkpoint
"""

import dataclasses
import json
import multiprocessing
import pathlib
import shutil
import statistics
import time
from unittest import mock

from etils import epath
import jax
import jax.numpy as jnp

from experiments.benchmarks import memory
from sae_jax import autoencoder, checkpoint
from sae_jax import config as config_lib
from sae_jax.cli import flags
from sae_jax.storage import saved_arrays


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(config_lib.Config):
  """The autoencoder that is saved."""

  n: int = config_lib.option(16_384, 'number of latents, N', least=1)
  d: int = config_lib.option(1024, 'width of the activations, D', least=1)
  repeats: int = config_lib.option(
    7, 'times that each way of saving is measured', least=1
  )


def contents(config: autoencoder.SaeConfig) -> checkpoint.Contents:
  """The state of a run whose moments are as random as its weights."""
  sae = autoencoder.init_weights(config, jax.random.key(0))
  moments = autoencoder.trained(sae)
  count = jnp.array(1)
  return checkpoint.Contents(
    sae=sae,
    ema={'count': count, 'ema': moments},
    adam={'count': count, 'mu': moments, 'nu': moments},
    progress={
      'silent_N': jnp.zeros(config.n_latents, jnp.int32),
      'mse_of_mean': jnp.array(1.0),
      'step': count,
      'skipped': count,
    },
  )


def measure(workdir: str, saved: checkpoint.Contents, metadata) -> list[float]:
  """Seconds, and seconds of processors, of a save and of a load."""
  shutil.rmtree(workdir, ignore_errors=True)
  times = [(time.perf_counter(), time.process_time())]
  with checkpoint.open_checkpointer(workdir) as checkpointer:
    checkpoint.save(checkpointer, 1, saved, metadata).result()
    times.append((time.perf_counter(), time.process_time()))
    jax.block_until_ready(checkpoint.read(checkpointer, 1, saved).parts())
    times.append((time.perf_counter(), time.process_time()))
  return [
    after - before
    for which in (0, 1)
    for (before, after) in zip(
      [t[which] for t in times], [t[which] for t in times[1:]]
    )
  ]


def load_peak(workdir: str, average: bool) -> float:
  """The peak of this process's memory in a load, over the bytes it gives."""
  jax.devices()
  start = memory.resident()
  sae = checkpoint.load(workdir, average=average).sae
  jax.block_until_ready(sae)
  # Not getrusage, whose peak is the parent's where that was higher.
  status = pathlib.Path('/proc/self/status').read_text()
  peak = int(status.partition('VmHWM:')[2].split()[0]) / 2**10
  n_bytes = sum(a.nbytes for a in jax.tree.leaves(sae))
  return (peak - start) * 2**20 / n_bytes


def peaks(workdir: str) -> list[float]:
  """`load_peak` of the average and of the last parameters."""
  new = multiprocessing.get_context('spawn')
  shares = []
  for average in (True, False):
    # A process each: a peak is never forgotten.
    with new.Pool(1) as pool:
      shares.append(round(pool.apply(load_peak, (workdir, average)), 3))
  return shares


def main() -> None:
  """Measures and prints."""
  config, workdir = flags.read(BenchmarkConfig), flags.url('workdir')
  sae_config = autoencoder.SaeConfig(d_model=config.d, n_latents=config.n, k=32)
  saved = contents(sae_config)
  metadata = checkpoint.Metadata(
    train_config={
      'sae': dataclasses.asdict(sae_config),
      'optimizer': {'ema_decay': 0.9},
      'sample_rows': 1,
    },
    mse_of_mean=1.0,
    dataset={},
    metric_definitions={},
  )
  folder = str(epath.Path(workdir) / 'run')
  # A save compiles nothing, but makes threads and imports modules.
  measure(folder, saved, metadata)
  ratios = []
  for _ in range(config.repeats):
    with mock.patch.object(saved_arrays, 'add_digests', lambda spec: None):
      without = measure(folder, saved, metadata)
    ratios.append(
      [b / a for a, b in zip(without, measure(folder, saved, metadata))]
    )
  names = ('save_ratio', 'load_ratio', 'save_cpu_ratio', 'load_cpu_ratio')
  medians = [statistics.median(column) for column in zip(*ratios)]
  n_bytes = sum(a.nbytes for a in jax.tree.leaves(saved.parts()))
  result = {name: round(m, 3) for name, m in zip(names, medians)}
  print(json.dumps({'bytes': n_bytes, 'load_peak': peaks(folder)} | result))


if __name__ == '__main__':
  flags.define(BenchmarkConfig)
  flags.define_url('workdir', 'scratch folder')
  flags.run(main, __doc__)
