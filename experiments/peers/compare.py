"""Compares this package's training with other TopK trainers on the same rows.

  make peers

or, with a Python that has the other libraries (requirements.txt beside this
file) and another store:

  python -m experiments.peers.compare --store=runs/demo/store \\
    --workdir=runs/peers --torch_python=.venv-peers/bin/python

All get the same rows (less their own mean, at unit norm) in the same order and
batches, and the same schedule where a library has one: `torch_cell` says what
each library is given. Documents are split in three: trained on, chosen on (the
rate) and reported on. Rates begin as three each and are extended by factors of
two until the best is not at an end. `metric` is the one metric for all.

Lines of finished cells are in results/ of the workdir; they are not run again,
and files with lines from another machine can be put beside them. The table is
printed and written as peers.json.
"""

import dataclasses
import os
import pathlib
import subprocess

from experiments.peers import files, grid, table
from experiments.peers import ours as ours_lib
from experiments.peers import rows as rows_lib
from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.cli import flags, huge_pages
from sae_jax.storage import files as storage_files

# From which `python -m experiments...` runs.
_ROOT = pathlib.Path(__file__).parents[2]
PEERS = ('sparsify_adam', 'sparsify', 'saelens', 'dictionary_learning')


@dataclasses.dataclass(frozen=True)
class PeersConfig(config_lib.Config):
  """The comparison."""

  ours: ours_lib.OursConfig = dataclasses.field(
    default_factory=ours_lib.OursConfig
  )
  site: str = config_lib.option(
    '', 'site of the store to read; may be left out if it has only one'
  )
  peers: tuple[str, ...] = config_lib.option(
    PEERS, f'other trainers, some of {", ".join(PEERS)}'
  )
  torch_python: str = config_lib.option(
    '',
    'Python that has the other libraries; empty to run no cell of theirs and '
    'show those that are there',
  )
  device: str = config_lib.option('cpu', "torch's device, cpu or cuda")
  workers: int = config_lib.option(
    1, "number of the other libraries' cells that run at the same time", least=1
  )

  def __post_init__(self):
    super().__post_init__()
    unknown = sorted(set(self.peers) - set(PEERS))
    if unknown or not self.peers:
      raise errors.UserError(
        f'{", ".join(unknown) or "none"} is not a peer: use some of '
        f'{", ".join(PEERS)}'
      )


def compare(config: PeersConfig, store: str, workdir: str) -> dict:
  """Runs what is missing and compares.

  Args:
    config: what to compare.
    store: URL of a finished store.
    workdir: a local folder.

  Returns:
    What is written to peers.json.

  Raises:
    UserError: if the store or a setting does not fit, or cells of the other
      libraries failed.
  """
  shapes = grid.shapes(config.ours.shapes)
  rows_config = rows_lib.RowsConfig(
    site=config.site,
    n_tokens=max(tokens for _, _, tokens in shapes),
    batch_size=config.ours.batch_size,
    seeds=config.ours.seeds,
  )
  rows_lib.write(rows_config, store, workdir)
  ours_lib.run(config.ours, workdir)
  if config.torch_python:
    _run_peers(config, workdir)
  result = summary(config, workdir)
  path = os.path.join(workdir, 'peers.json')
  storage_files.write_text(path, config_lib.to_json(result))
  return result


def summary(config: PeersConfig, workdir: str) -> dict:
  """The comparison of the cells that are done."""
  rows = files.digest(workdir)
  results = grid.read(os.path.join(workdir, ours_lib.RESULTS))
  seeds = tuple(map(int, config.ours.seeds))
  out = {
    'made_from': rows_lib.about(workdir),
    'rows': rows,
    'row_counts': files.counts(workdir),
    'shapes': [],
  }
  for n, k, tokens in grid.shapes(config.ours.shapes):
    batch = config.ours.batch_size
    groups = {
      ours_lib.TRAINER: ours_lib.group(config.ours, (n, k, tokens), workdir),
      **{
        peer: grid.Cell(peer, n, k, tokens, batch, 0.0, 0, rows)
        for peer in config.peers
      },
    }
    trainers = {
      name: table.at_best_rate(group, seeds, results)
      for name, group in groups.items()
    }
    own = trainers[ours_lib.TRAINER]
    others = {p: trainers[p] for p in config.peers if trainers[p]}
    out['shapes'].append(
      {
        'n': n,
        'k': k,
        'tokens': tokens,
        'batch': batch,
        'seeds': len(seeds),
        'trainers': trainers,
        'verdict': table.verdict(own, others) if own and others else None,
      }
    )
  return out


def _run_peers(config: PeersConfig, workdir: str) -> None:
  """Runs the other libraries' cells in their own environment."""
  command = [
    os.path.abspath(config.torch_python), '-m', 'experiments.peers.torch_peers',
    f'--rows={workdir}',
    f'--results={os.path.join(workdir, ours_lib.RESULTS, "torch.jsonl")}',
    f'--trainers={",".join(config.peers)}',
    f'--shapes={",".join(config.ours.shapes)}',
    f'--batch={config.ours.batch_size}',
    f'--seeds={",".join(config.ours.seeds)}',
    f'--device={config.device}',
    f'--workers={config.workers}',
  ]  # fmt: skip
  try:
    done = subprocess.run(command, cwd=_ROOT)
  except OSError as error:
    raise errors.UserError(
      f'cannot run {config.torch_python}: {errors.reason(error)}: '
      'give the Python of `make peers`'
    ) from error
  if done.returncode:
    raise errors.UserError(
      f'cells of other trainers failed, exit status {done.returncode}: the '
      'same command runs them again'
    )


def main() -> None:
  """Entry point."""
  flags.define(PeersConfig)
  flags.define_url('store', 'finished store of activations')
  flags.define_url('workdir', 'local folder for rows, results and the table')

  def work():
    config = flags.read(PeersConfig)
    result = compare(config, flags.url('store'), flags.url('workdir'))
    for shape in result['shapes']:
      print('\n'.join(table.lines(shape, ours_lib.TRAINER)))

  flags.run(work, __doc__)


if __name__ == '__main__':
  huge_pages.use_huge_pages()
  main()
