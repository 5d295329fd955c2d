"""Times the top k of rows on a CPU, by `ops.top_k` and by `lax.top_k`.

Prints a JSON line for each shape: the medians in seconds, by turns, and how
many times as long `lax.top_k` took.

  python -m experiments.benchmarks.top_k --shapes=4096:4096:32,1024:32768:32
"""

import json
import statistics
import time

from absl import app, flags
import jax

from sae_jax import ops
from sae_jax.cli import huge_pages

_SHAPES = flags.DEFINE_list(
  'shapes',
  ['4096:2048:16', '4096:4096:32', '4096:4096:64', '1024:32768:32'],
  'rows:entries:k of each',
)
_REPEATS = flags.DEFINE_integer('repeats', 9, 'timed runs of each')


def measure(rows: int, entries: int, k: int, repeats: int) -> dict[str, float]:
  """Seconds of either at one shape, and their ratio."""
  x_BN = jax.random.normal(jax.random.key(0), (rows, entries))
  runs = {
    name: jax.jit(lambda x_BN, of=of: of(x_BN, k))
    for name, of in (('ops', ops.top_k), ('lax', jax.lax.top_k))
  }
  seconds = {name: [] for name in runs}
  for turn in range(repeats + 1):
    for name, run in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run(x_BN))
      # Of the first turn most is compiling.
      if turn:
        seconds[name].append(time.perf_counter() - start)
  medians = {name: statistics.median(of) for name, of in seconds.items()}
  return medians | {'ratio': medians['lax'] / medians['ops']}


def main(argv) -> None:
  """Prints the times of each shape."""
  del argv
  for shape in _SHAPES.value:
    sizes = map(int, shape.split(':'))
    times = measure(*sizes, _REPEATS.value)
    print(json.dumps({'shape': shape} | times))


if __name__ == '__main__':
  huge_pages.use_huge_pages()
  app.run(main)
