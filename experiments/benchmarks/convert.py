"""Memory and time of converting a large autoencoder, file by file.

Prints one JSON line last. An autoencoder of random weights is written to a file
and converted, each in a process of its own:

  checkpoint   the file to a checkpoint
  file         the file to the other format
  again        that checkpoint to the file's format

`peak_mib` is the peak of the process's resident memory, `over_jax_mib` that
without what a process has which has imported jax alone, and `tensor_mib` the
largest tensor of what is written.

  python -m experiments.benchmarks.convert --workdir=runs/convert

What is converted is deleted when it has been measured. 1,048,576 latents of
width 2,304 in bfloat16, as SAELens writes them, take 50 GB of disk:

  python -m experiments.benchmarks.convert --workdir=runs/convert \\
    --format=saelens --dtype=bfloat16 --n=1048576 --d=2304
"""

import dataclasses
import json
import multiprocessing
import pathlib
import shutil
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import store
from sae_jax import config as config_lib
from sae_jax.cli import flags
from sae_jax.interchange import convert, imported, registry
from sae_jax.storage import tensors

_OTHER = {'openai': 'saelens', 'saelens': 'sparsify'}
_FILE = {'openai': 'sae.pt', 'saelens': 'sae', 'sparsify': 'sae'}
_STORED_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(config_lib.Config):
  """The autoencoder that is converted."""

  n: int = config_lib.option(131_072, 'number of latents, N', least=1)
  d: int = config_lib.option(768, 'width of the activations, D', least=1)
  format: str = config_lib.option('openai', 'format of the file', tuple(_OTHER))
  dtype: str = config_lib.option(
    'float32', 'dtype of the file', ('float32', 'bfloat16')
  )


def drawn(shape: tuple[int, ...], dtype: str, seed: int) -> tensors.Tensor:
  """A tensor of numbers from -1/2 to 1/2, any part of which is made alone."""

  def part(ranges: tensors.Ranges) -> np.ndarray:
    # A hash of the value's place.
    bits = np.full((1,) * len(ranges), seed * 0x9E3779B1 % 2**32, np.uint32)
    for axis, (start, stop) in enumerate(ranges):
      places = np.arange(start, stop, dtype=np.uint32)
      others = len(ranges) - axis - 1
      bits = (bits ^ places.reshape(-1, *[1] * others)) * np.uint32(0x85EBCA6B)
      bits ^= bits >> np.uint32(15)
    bits *= np.uint32(0xC2B2AE35)
    values = (bits >> np.uint32(8)).astype(np.float32)
    values *= np.float32(2**-24)
    values -= np.float32(0.5)
    return values.astype(jnp.dtype(dtype))

  return tensors.Tensor(shape, np.dtype(jnp.dtype(dtype)), part)


def autoencoder(config: BenchmarkConfig) -> imported.Imported:
  """A TopK autoencoder as its format has it."""
  shapes = {
    'w_enc_ND': (config.n, config.d),
    'w_dec_ND': (config.n, config.d),
    'b_enc_N': (config.n,),
    'b_dec_D': (config.d,),
  }
  return imported.Imported(
    format=config.format,
    url='drawn',
    d_in=config.d,
    d_out=config.d,
    n_latents=config.n,
    tensors={
      name: drawn(shape, config.dtype, seed)
      for seed, (name, shape) in enumerate(shapes.items())
    },
    transposed=frozenset(),
    extra={},
    semantics=imported.Semantics(
      nonlinearity='topk',
      k=32,
      normalisation='layer_norm' if config.format == 'openai' else 'none',
      subtract_b_dec=True,
    ),
    provenance=imported.Provenance(),
  )


def jax_mib() -> float:
  """The peak of a process that imports jax and finds its devices."""
  program = 'import jax; jax.devices(); print(open("/proc/self/status").read())'
  command = [sys.executable, '-c', program]
  status = subprocess.run(command, capture_output=True, text=True, check=True)
  return _peak_mib(status.stdout)


def _peak_mib(status: str) -> float:
  # Not getrusage, whose peak is the parent's where that was higher.
  return int(status.partition('VmHWM:')[2].split()[0]) / 2**10


def converted(to: str, source: str, out: str, data: str | None) -> dict:
  """Converts in this process; its peak of memory and the time."""
  began = time.monotonic()
  convert.convert(convert.ConvertConfig(to=to), source, out, data)
  seconds = time.monotonic() - began
  peak = _peak_mib(pathlib.Path('/proc/self/status').read_text())
  return {'peak_mib': round(peak), 'seconds': round(seconds, 1)}


def measure(config: BenchmarkConfig, workdir: pathlib.Path) -> dict[str, dict]:
  """Writes the file, and measures each conversion of it."""
  data = str(workdir / f'store_{config.d}')
  gib = _STORED_ROWS * config.d * 4 / 2**30
  store.make(store.BenchmarkConfig(gib=gib, d=config.d), data)
  shutil.rmtree(workdir / 'files', ignore_errors=True)
  source = _path(workdir, 'source', config.format)
  registry.write(autoencoder(config), config.format, source)
  base, results = jax_mib(), {}
  made = str(workdir / 'files' / 'checkpoint')
  other = _OTHER[config.format]
  for name, to, given, out in (
    ('file', other, source, _path(workdir, 'file', other)),
    ('checkpoint', 'checkpoint', source, made),
    ('again', config.format, made, _path(workdir, 'again', config.format)),
  ):
    # A process each: a peak is never forgotten.
    with multiprocessing.get_context('spawn').Pool(1) as pool:
      result = pool.apply(converted, (to, given, out, data))
    itemsize = jnp.dtype(config.dtype if name == 'file' else 'float32').itemsize
    results[name] = result | {
      'over_jax_mib': round(result['peak_mib'] - base),
      'tensor_mib': round(config.n * config.d * itemsize / 2**20),
    }
    print(name, json.dumps(results[name]), flush=True)
    if name != 'checkpoint':
      shutil.rmtree(pathlib.Path(out).parent)
  shutil.rmtree(workdir / 'files')
  return results


def _path(workdir: pathlib.Path, folder: str, kind: str) -> str:
  (workdir / 'files' / folder).mkdir(parents=True)
  return str(workdir / 'files' / folder / _FILE[kind])


def work() -> None:
  """Measures as the flags say."""
  config = flags.read(BenchmarkConfig)
  results = measure(config, pathlib.Path(flags.url('workdir')))
  print(json.dumps(dataclasses.asdict(config) | results))


if __name__ == '__main__':
  flags.define(BenchmarkConfig)
  flags.define_url('workdir', 'scratch folder')
  flags.run(work, __doc__)
