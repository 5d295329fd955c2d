"""Times what sae-probe does with a store: the scan, and what follows from it.

Prints one JSON line last. By turns, --repeats times each: reading and encoding
the rows alone, in batches as the scan has them; the scan with its reducers and
codes, but two test rows, no components and no control; and the whole scan.
Then, once each, the votes, the neighbours, and the second pass with the writing
of the table. `seconds` are those that passed and `processor_seconds` those of
this process's processors, which other programs of the machine change less; of
what is repeated the medians, without the first turn, in which programs are
compiled.
`ratio` and `processor_ratio` are the medians of each turn's scan over its
encoding.

  python -m experiments.benchmarks.probe --workdir=runs/probe_times \\
    --store=runs/demo/store --checkpoint=runs/demo/train
"""

from collections.abc import Callable
import dataclasses
import functools
import json
import shutil
import statistics
import time
from typing import Any

import jax

from sae_jax import autoencoder, checkpoint, store
from sae_jax import config as config_lib
from sae_jax import mesh as mesh_lib
from sae_jax import subject as subject_lib
from sae_jax.cli import flags, huge_pages
from sae_jax.probing import lens, neighbours, reconstruction, table
from sae_jax.probing.examples import FeatureConfig
from sae_jax.probing.scan import rows
from sae_jax.probing.scan.config import ScanConfig
from sae_jax.probing.scan.run import scan
from sae_jax.subject import capture


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(config_lib.Config):
  """How it is measured."""

  rows: int = config_lib.option(
    1_000_000, 'most rows that are read, from the first on', least=1
  )
  batch_rows: int = config_lib.option(
    ScanConfig.batch_rows, 'rows of a batch', least=1
  )
  repeats: int = config_lib.option(3, 'turns that count', least=1)
  subject: str = config_lib.option(
    '', "the store's subject, for the votes; empty for no votes"
  )


def timed(function: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
  """Seconds that passed, those of the processors, and the result."""
  before = time.perf_counter(), time.process_time()
  result = function()
  after = time.perf_counter(), time.process_time()
  return tuple(b - a for a, b in zip(before, after)), result


def encode_all(config, trained, opened, mesh) -> None:
  """Reads and encodes, as the scan reads and training encodes."""
  pieces = [rows.Segment(0, config.feature_rows, features=True)]
  parts = rows.batches(pieces, config.batch_rows)
  with rows.read_ahead(parts, opened, config.batch_rows, mesh) as ready:
    for _, batch in ready:
      codes = _encode(trained.config, trained.sae, batch.raw_BD)
  jax.block_until_ready(codes)


@functools.partial(jax.jit, static_argnums=0)
def _encode(config, sae, raw_BD):
  x_BD, _ = autoencoder.preprocess(config, sae, raw_BD)
  return autoencoder.encode(config, sae, x_BD)


def measure(
  config: BenchmarkConfig,
  trained: checkpoint.Trained,
  opened: store.Store,
  subject: subject_lib.Subject | None,
  mesh: jax.sharding.Mesh,
  workdir: str,
) -> dict[str, Any]:
  """All times; the workdir is emptied."""
  n_rows = min(config.rows, opened.manifest.n_rows)
  scan_config = ScanConfig(
    feature_rows=n_rows, pca_rows=n_rows, batch_rows=config.batch_rows
  )
  controls = {
    'untrained': reconstruction.untrained(
      trained.config, opened.finite_rows(0, min(8192, opened.n_train)), 1, mesh
    )
  }

  # The fewest test rows that a scan takes.
  few_scores = dataclasses.replace(scan_config, pca_rows=0, eval_rows=2)

  def scan_all(of, beside):
    shutil.rmtree(workdir, ignore_errors=True)
    return scan(of, trained, opened, workdir, mesh, beside)

  turns = []
  for _ in range(config.repeats + 1):
    alone, _ = timed(lambda: encode_all(scan_config, trained, opened, mesh))
    reduced, _ = timed(lambda: scan_all(few_scores, {}))
    whole, result = timed(lambda: scan_all(scan_config, controls))
    turns.append((alone, reduced, whole))
  del turns[0]
  names = 'read_and_encode', 'scan_without_scores', 'scan'
  times = {
    name: [statistics.median(turn[i][j] for turn in turns) for j in range(2)]
    for i, name in enumerate(names)
  }

  def ratios(j):
    """Of the seconds, or of the processor seconds."""
    return {
      name: round(
        statistics.median(turn[i][j] / turn[0][j] for turn in turns), 2
      )
      for i, name in enumerate(names[1:], 1)
    }

  features = FeatureConfig(votes=10 if subject else 0)
  w_dec_ND = trained.sae.w_dec_ND
  if subject:
    site = capture.parse_site(opened.site)
    times['votes'], _ = timed(
      lambda: lens.votes(subject, site, w_dec_ND, features.votes)
    )
  count = min(features.neighbours, len(w_dec_ND) - 1)
  times['neighbours'], _ = timed(lambda: neighbours.nearest(w_dec_ND, count))
  # Votes and neighbours have times of their own.
  rest = dataclasses.replace(features, votes=0, neighbours=0)

  def fill():
    table.fill(
      rest,
      trained,
      subject,
      opened,
      result,
      f'{workdir}/features',
      f'{workdir}/scratch',
      seed=0,
    ).seal({})

  times['second_pass_and_table'], _ = timed(fill)
  return {
    'rows': n_rows,
    'seconds': {name: round(of[0], 2) for name, of in times.items()},
    'processor_seconds': {name: round(of[1], 2) for name, of in times.items()},
    'ratio': ratios(0),
    'processor_ratio': ratios(1),
  }


def main() -> None:
  """Measures and prints."""
  config = flags.read(BenchmarkConfig)
  mesh = mesh_lib.make_mesh(1, 1)
  trained = checkpoint.load(flags.url('checkpoint'), mesh=mesh)
  opened = store.open_store(flags.url('store'), in_order=True)
  subject = None
  if config.subject:
    facts = opened.manifest
    subject = subject_lib.load_recorded(
      facts.subject, facts.weights_sha256, config.subject
    )
  result = measure(config, trained, opened, subject, mesh, flags.url('workdir'))
  print(json.dumps({'config': dataclasses.asdict(config)} | result))


if __name__ == '__main__':
  huge_pages.use_huge_pages()
  flags.define(BenchmarkConfig)
  flags.define_url('workdir', 'scratch folder, which is emptied')
  flags.define_url('store', 'a store of activations')
  flags.define_url('checkpoint', 'workdir of a training run on it')
  flags.run(main, __doc__)
