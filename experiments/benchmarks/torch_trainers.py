"""Times a training step of public PyTorch TopK-SAE trainers on the CPU.

It imports no jax and nothing of sae_jax, and runs in the environment of
experiments/peers/requirements.txt, which `make peers` makes:

  .venv-peers/bin/python -m experiments.benchmarks.torch_trainers \
    --d=768 --n=32768 --k=32 --batch=4096 --steps=8

Each run is the library's own training loop, with its default settings, given
rows of torch.randn in f32, the same to all, one fresh batch a step:

  sparsify             `Trainer.fit` on a stub model that returns the rows; its
                       default optimizer is schedule-free SignSGD ('signum')
  sparsify_adam        the same with `optimizer='adam'`
  saelens              `SAETrainer.fit` on `TopKTrainingSAE`; Adam
  saelens_sparse       the same with `use_sparse_activations=True`, and with
                       `rescale_acts_by_decoder_norm=False`, for the backward of
                       the two together is not implemented on a CPU
  dictionary_learning  `trainSAE` with `TopKTrainer`; Adam

A step is timed from the moment the loop has its batch to the moment it asks for
the next: forward, loss, backward, what the library does to gradients and
decoder, optimizer, schedule, zeroing of gradients, counts of dead latents. No
latent is dead yet, so no auxiliary loss is computed (sparsify's is off by
default). Not timed: making batches, model forwards, logging, checkpoints, and
the first two steps, in which optimizer states and biases are initialised.

  sparsify             unit-norm decoder before the forward; gradient parallel
                       to the decoder removed; no clipping
  saelens              decoder left as it is, its norms multiplied into the
                       pre-activations and divided out of the activations
                       (saelens_sparse: neither); clipping to 1
  dictionary_learning  gradient parallel to the decoder removed; clipping to 1;
                       unit-norm decoder after the update

Each run has a process of its own and prints a JSON line. Peak memory is that of
the whole process, of which `import_memory_gib` was in use before anything was
built. `encoder_matmul_s` is torch's x @ W.T alone, output allocated each time.
The last line is everything in one object.
"""

import argparse
from collections.abc import Iterator
import functools
import importlib
import importlib.metadata
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import traceback

from experiments.peers import torch_libraries

_WARMUP = 2


def _batches(args, seconds: list[float]) -> Iterator:
  """Yields the batches, noting how long each is worked on."""
  import torch

  generator = torch.Generator().manual_seed(0)
  for _ in range(_WARMUP + args.steps):
    x_BD = torch.randn(args.batch, args.d, generator=generator)
    began = time.perf_counter()
    yield x_BD
    seconds.append(time.perf_counter() - began)


def _class_name(value) -> str:
  return f'{type(value).__module__.split(".")[0]}.{type(value).__name__}'


def _matmul(args, batches: Iterator) -> str:
  """The encoder's product alone."""
  import torch

  w_ND = torch.randn(args.n, args.d)
  for x_BD in batches:
    x_BD @ w_ND.T
  return 'none'


def _shape(args) -> dict[str, int]:
  shape = {name: getattr(args, name) for name in ('d', 'n', 'k', 'batch')}
  return shape | {'steps': _WARMUP + args.steps}


def _sparsify(args, batches: Iterator, **options) -> str:
  """Trains by sparsify and returns the optimizer's name."""
  trainer = torch_libraries.sparsify(batches, **_shape(args), **options)
  (optimizer,) = trainer.optimizers
  if base := getattr(optimizer, 'base', None):
    return f'{_class_name(optimizer)}({_class_name(base)})'
  return _class_name(optimizer)


def _saelens(args, batches: Iterator, **options) -> str:
  """Trains by SAELens and returns the optimizer's name."""
  trainer = torch_libraries.saelens(batches, **_shape(args), options=options)
  return _class_name(trainer.optimizer)


def _dictionary_learning(args, batches: Iterator) -> str:
  """Trains by dictionary_learning and returns the optimizer's name."""
  shape = _shape(args)
  del shape['batch']
  # The schedule wants more than its warm-up's 1000; the batches end first.
  shape['steps'] = 100_000
  trainer = torch_libraries.dictionary_learning(batches, **shape)
  return _class_name(trainer.optimizer)


# What each run is called: module, distribution, function.
_MATMUL = {'matmul': ('torch', 'torch', _matmul)}
_LIBRARIES = {
  'sparsify': {
    'sparsify': ('sparsify', 'eai-sparsify', _sparsify),
    'sparsify_adam': (
      'sparsify',
      'eai-sparsify',
      functools.partial(_sparsify, optimizer='adam'),
    ),
  },
  'saelens': {
    'saelens': ('sae_lens', 'sae-lens', _saelens),
    'saelens_sparse': (
      'sae_lens',
      'sae-lens',
      functools.partial(
        _saelens,
        use_sparse_activations=True,
        rescale_acts_by_decoder_norm=False,
      ),
    ),
  },
  'dictionary_learning': {
    'dictionary_learning': (
      'dictionary_learning.training',
      'dictionary-learning',
      _dictionary_learning,
    )
  },
}


def _peak_gib() -> float:
  unit = 1 if sys.platform == 'darwin' else 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  return round(peak / 2**30, 3)


def measure(name: str, args) -> dict:
  """Does one run in this process."""
  runs = functools.reduce(dict.__or__, _LIBRARIES.values(), _MATMUL)
  module, distribution, train = runs[name]
  import torch

  torch.set_num_threads(os.cpu_count())
  torch.manual_seed(0)
  importlib.import_module(module)
  import_memory = _peak_gib()
  seconds = []
  batches = _batches(args, seconds)
  optimizer = train(args, batches)
  # A loop that counts its steps does not ask for one more batch: end the last.
  next(batches, None)
  peak = _peak_gib()
  if len(seconds) != _WARMUP + args.steps:
    raise RuntimeError(f'{len(seconds)} steps were done')
  seconds = seconds[_WARMUP:]
  median = statistics.median(seconds)
  return {
    'version': importlib.metadata.version(distribution),
    'optimizer': optimizer,
    'step_s_median': round(median, 4),
    'step_s_min': round(min(seconds), 4),
    'tokens_per_s': round(args.batch / median, 1),
    'peak_memory_gib': peak,
    'import_memory_gib': import_memory,
  }


def _measure_apart(name: str, args) -> dict:
  """Does one run in a process of its own; a failure is returned as 'error'."""
  # This process stays small: on Linux a child's peak starts at its parent's.
  command = [sys.executable, '-m', __spec__.name, f'--run={name}']
  command += [
    f'--{key}={getattr(args, key)}' for key in ('d', 'n', 'k', 'batch', 'steps')
  ]
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
  if done.returncode:
    # Killed, for want of memory perhaps: it had no time to say why.
    return {'error': f'exit status {done.returncode}'}
  return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
  """Entry point."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--d', type=int, default=768, help='activation width')
  parser.add_argument('--n', type=int, default=32768, help='latents')
  parser.add_argument('--k', type=int, default=32, help='active latents')
  parser.add_argument('--batch', type=int, default=4096, help='tokens a step')
  parser.add_argument('--steps', type=int, default=8, help='steps timed')
  parser.add_argument(
    '--libraries', default=','.join(_LIBRARIES), help='which to run'
  )
  parser.add_argument('--run', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.run:
    try:
      result = measure(args.run, args)
    except Exception as error:
      traceback.print_exc()
      line = (str(error).splitlines() or [''])[0]
      result = {'error': f'{type(error).__name__}: {line}'}
    print(json.dumps(result))
    return
  libraries = args.libraries.split(',')
  if unknown := set(libraries) - set(_LIBRARIES):
    parser.error(f'unknown libraries: {", ".join(sorted(unknown))}')
  matmul = _measure_apart('matmul', args)
  print(json.dumps({'matmul': matmul}), flush=True)
  results = {}
  for library in libraries:
    for name in _LIBRARIES[library]:
      results[name] = _measure_apart(name, args)
      print(json.dumps({name: results[name]}), flush=True)
  shape = {key: getattr(args, key) for key in ('d', 'n', 'k', 'batch', 'steps')}
  print(
    json.dumps(
      {
        **shape,
        'torch': matmul.get('version'),
        'threads': os.cpu_count(),
        'encoder_matmul_s': matmul.get('step_s_median'),
        'libraries': results,
      }
    )
  )


if __name__ == '__main__':
  main()
