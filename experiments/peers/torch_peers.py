"""Trains and scores PyTorch trainers of TopK autoencoders on rows in files.

It imports no jax and nothing of sae_jax: experiments/peers/ and the rows are
all that a machine needs beside torch, numpy and the libraries.

  python -m experiments.peers.torch_peers --rows=FOLDER --results=FILE.jsonl

`torch_cell` says what each trainer is given.

The rates of each trainer and shape are extended by factors of two until the
best on validation rows is not at an edge. A cell (trainer, shape, rate, seed)
with a line in any .jsonl file of the results' folder is not run again.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import sys
import traceback

from experiments.peers import files, grid, torch_cell

# The rates to begin with, near the best in shorter runs.
RATES = {
  'sparsify_adam': (1e-3, 2e-3, 4e-3),
  'sparsify': (2e-3, 4e-3, 8e-3),
  'saelens': (1e-3, 2e-3, 4e-3),
  'dictionary_learning': (1e-3, 2e-3, 4e-3),
}


def _begin(threads: int) -> None:
  """Prepares a worker."""
  # The Triton decoder of sparsify is for GPUs alone, and the plain one is the
  # same function.
  os.environ['SPARSIFY_DISABLE_TRITON'] = '1'
  import torch

  torch.set_num_threads(threads)


def run(
  folder: str,
  path: str,
  trainers: list[str],
  shapes: list[tuple[int, int, int]],
  batch: int,
  seeds: list[int],
  device: str,
  workers: int,
) -> int:
  """Runs all cells that are still to be run, and how many of them failed.

  Args:
    folder: of the rows' files.
    path: the file that lines are added to; files beside it are read too.
    trainers: names of trainers.
    shapes: n, k, tokens of each shape.
    batch: tokens of a step.
    seeds: the seeds.
    device: torch's name of the device.
    workers: processes that run cells at the same time.
  """
  rows = files.digest(folder)
  ordered = all(os.path.exists(files.order_path(folder, s)) for s in seeds)
  settings = '' if ordered else "in the file's order"
  groups = {
    grid.Cell(trainer, *shape, batch, 0.0, 0, rows, settings): RATES[trainer]
    # The longest first, so that none is left over at the end.
    for shape in sorted(shapes, key=lambda s: -s[0] * s[2])
    for trainer in trainers
  }
  results = grid.read(os.path.dirname(path) or '.')
  running, failed = {}, set()
  threads = max(1, (os.cpu_count() or 1) // workers)
  with concurrent.futures.ProcessPoolExecutor(
    workers, multiprocessing.get_context('spawn'), _begin, (threads,)
  ) as pool:
    while True:
      for group, rates in groups.items():
        for cell in grid.wanted(group, rates, seeds, results):
          if cell not in failed and cell not in running.values():
            running[pool.submit(torch_cell.run_cell, cell, folder, device)] = (
              cell
            )
      if not running:
        return len(failed)
      done, _ = concurrent.futures.wait(
        running, return_when=concurrent.futures.FIRST_COMPLETED
      )
      for future in done:
        cell = running.pop(future)
        try:
          results[cell] = future.result()
        except Exception:
          traceback.print_exc()
          print(f'failed: {cell}', file=sys.stderr, flush=True)
          failed.add(cell)
          continue
        grid.append(path, cell, results[cell])
        print(grid.line(cell, results[cell]), flush=True)


def main() -> None:
  """Entry point."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--rows', required=True, help="folder of the rows' files")
  parser.add_argument('--results', required=True, help='.jsonl file to add to')
  parser.add_argument(
    '--trainers', default=','.join(RATES), help='which to run'
  )
  parser.add_argument(
    '--shapes', default=','.join(grid.SHAPES), help='latents:k:tokens of each'
  )
  parser.add_argument(
    '--batch', type=int, default=grid.BATCH, help='tokens of a step'
  )
  parser.add_argument('--seeds', default='0,1', help='seeds of each cell')
  parser.add_argument('--device', default='cpu', help="cpu or cuda, as torch's")
  parser.add_argument(
    '--workers', type=int, default=1, help='cells that run at the same time'
  )
  args = parser.parse_args()
  trainers = args.trainers.split(',')
  if unknown := set(trainers) - set(RATES):
    parser.error(f'unknown trainers: {", ".join(sorted(unknown))}')
  failed = run(
    args.rows,
    args.results,
    trainers,
    grid.shapes(args.shapes.split(',')),
    args.batch,
    list(map(int, args.seeds.split(','))),
    args.device,
    args.workers,
  )
  if failed:
    sys.exit(f'{failed} cells failed: the same command runs them again')


if __name__ == '__main__':
  main()
