"""Follows a process's memory through a long harvest and an epoch of reading.

Prints one JSON line last. For each of the two it has the peak of resident
memory, in MiB, in every tenth of the rows, and `growth`: by what share the peak
of the second half exceeds that of the first half without its first tenth.

The subject runs only its first block, so that most of the time goes to text,
store and reading.

  python -m experiments.benchmarks.memory --workdir=runs/memory
"""

import dataclasses
import json
import os
import pathlib
import shutil
import threading
import time

from sae_jax import config as config_lib
from sae_jax import store
from sae_jax.cli import flags, huge_pages
from sae_jax.feed import from_store
from sae_jax.harvesting import harvest
from sae_jax.harvesting.config import HarvestConfig

_TENTHS = 10
_PAGE = os.sysconf('SC_PAGE_SIZE')


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(config_lib.Config):
  """What is harvested and read."""

  subject: str = config_lib.option(
    'smollm2-135m',
    'language model: a packaged subject, a .gguf file or a folder',
  )
  site: str = config_lib.option(
    'blocks.0.resid_post', 'site whose activations are stored'
  )
  n_tokens: int = config_lib.option(2_000_000, 'activations to store', least=1)
  batch: int = config_lib.option(2048, 'rows of a batch', least=1)
  seconds: float = config_lib.option(
    0.5, 'seconds between two looks at the memory'
  )


def resident() -> float:
  """This process's resident memory, MiB."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * _PAGE / 2**20


class Watch:
  """Looks at the memory while something goes from 0 to 1."""

  def __init__(self, seconds: float, done):
    self._seconds, self._done = seconds, done
    self._looks, self._end = [], threading.Event()

  def __enter__(self):
    self._thread = threading.Thread(target=self._look, daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *exc):
    self._end.set()
    self._thread.join()

  def _look(self):
    while not self._end.wait(self._seconds):
      self._looks.append((self._done(), resident()))

  def report(self) -> dict:
    """The greatest memory in every tenth, and how it grew."""
    tenths = [0.0] * _TENTHS
    for done, mib in self._looks:
      i = min(int(done * _TENTHS), _TENTHS - 1)
      tenths[i] = max(tenths[i], mib)
    first, last = max(tenths[1:5]), max(tenths[5:])
    # Few shards give few looks.
    growth = round(last / first - 1, 4) if first and last else None
    return {
      'mib': [round(mib) for mib in tenths],
      'growth': growth,
    }


def rows_there(url: str) -> int:
  """Rows of the shards that are complete."""
  # Their records are small, and looked at twice a second.
  total = 0
  for path in pathlib.Path(url, 'shards').glob('*.json'):
    total += json.loads(path.read_text())['rows']
  return total


def measure(config: BenchmarkConfig, workdir: pathlib.Path) -> dict:
  """Harvests and reads; the memory of both."""
  url = str(workdir / 'memory_store')
  shutil.rmtree(url, ignore_errors=True)
  harvesting = HarvestConfig(
    subject=config.subject, sites=(config.site,), n_tokens=config.n_tokens
  )
  began = time.monotonic()
  with Watch(
    config.seconds, lambda: rows_there(url) / config.n_tokens
  ) as harvested:
    harvest.harvest(harvesting, url)
  seconds = time.monotonic() - began
  opened = store.open_store(url)
  order = from_store.train_order(opened, 0, 64)
  steps = order.n_rows // config.batch
  batches = from_store.StoreFeed(opened, order, config.batch)
  total = steps * config.batch * opened.manifest.d_model * 4
  with Watch(config.seconds / 20, lambda: batches.bytes_read / total) as read:
    for _ in batches.iterate(0, steps):
      pass
  return dataclasses.asdict(config) | {
    'rows': opened.manifest.n_rows,
    'harvest': harvested.report() | {'seconds': round(seconds)},
    'epoch': read.report(),
  }


def work() -> None:
  """Measures as the flags say."""
  config = flags.read(BenchmarkConfig)
  print(json.dumps(measure(config, pathlib.Path(flags.url('workdir')))))


if __name__ == '__main__':
  huge_pages.use_huge_pages()
  flags.define(BenchmarkConfig)
  flags.define_url(
    'workdir', 'folder in which memory_store/ is written, replacing an old one'
  )
  flags.run(work, __doc__)
