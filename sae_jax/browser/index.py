"""The feature index: probing's arrays as small files that a page fetches.

Any server of static files can serve a built folder:

  index.html *.js style.css    the page, see `static`
  finished.json                what all is made from, digests of all files;
                               written last: without it a page is not finished
  data/meta.json               numbers of the whole
  data/columns.json            a list per column, one entry per latent, for
                               sorting, filtering and searching
  data/previews.json           a few tokens of each latent's best example
  data/vocabulary.json         token id -> its text, or its bytes where they are
                               not whole characters; other files hold ids alone
  data/features/00000.json     `features_per_shard` latents, see `entries`

Numbers that are not finite become null; absent examples, votes and
neighbours (-1 in the arrays) are left out.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import importlib.metadata
import math
import os
import re
from typing import Any

from etils import epath
import numpy as np

import sae_jax
from sae_jax import config as config_lib
from sae_jax import errors, processes, progress
from sae_jax import features as features_lib
from sae_jax import subject as subject_lib
from sae_jax.browser import entries, static
from sae_jax.features import Features
from sae_jax.storage import files, finished

FORMAT_VERSION = 4
# The files of a page, as its record names them.
NAMES = re.compile(r'(data/(features/)?)?\w+\.(html|js|css|svg|json)')
_SHARD = re.compile(r'\d{5,}\.json')
# Latents that are read at a time, or those of a data file if they are more.
_BLOCK = 512
# Below so many latents, processes take longer to start than they save.
_FEW = 4096
_MOST_PROCESSES = 32


@dataclasses.dataclass(frozen=True)
class BrowseConfig(config_lib.Config):
  """How the feature page is built."""

  subject: str = config_lib.option('', subject_lib.MOVED)
  title: str = config_lib.option(
    'Sparse autoencoder features', 'title of the page'
  )
  features_per_shard: int = config_lib.option(
    64,
    "number of latents in a data file; a latent's view fetches one file",
    least=1,
    most=100_000,
  )
  activation_digits: int = config_lib.option(
    4,
    'number of significant digits of the activations in examples',
    least=1,
    most=100_000,
  )
  label_tokens: int = config_lib.option(
    5,
    'number of top tokens and of top votes that label a latent in the list and'
    ' the search',
    least=1,
    most=100_000,
  )
  preview_tokens: int = config_lib.option(
    12,
    "number of tokens that the list shows of each latent's best example",
    least=1,
    most=100_000,
  )


def inputs(report: dict[str, Any], config: BrowseConfig) -> dict[str, Any]:
  """Everything that a page depends on, as it reads back from JSON."""
  # The same model, wherever it is.
  config = dataclasses.replace(config, subject='')
  return config_lib.through_json(
    {
      'report': _plain(report, 'report'),
      'browse_config': dataclasses.asdict(config),
      'page': static.digest(),
      'versions': {
        'sae_jax': sae_jax.__version__,
        'format': FORMAT_VERSION,
        'numpy': np.__version__,
        'tokenizers': importlib.metadata.version('tokenizers'),
      },
    }
  )


def build_index(
  features: Features | epath.PathLike,
  report: dict[str, Any],
  vocabulary: Sequence[str | bytes],
  out_url: epath.PathLike,
  config: BrowseConfig | None = None,
) -> str:
  """Writes the feature page and its data.

  The table is read by blocks of latents, which for many latents other processes
  do, one for each core.

  Args:
    features: the feature table, or its path or URL.
    report: the metrics of the autoencoder, as in `report.json`.
    vocabulary: the text of each token id, or its bytes where they are not whole
      characters.
    out_url: folder to write, or its URL; an older index in it is replaced.
    config: options of the page; the defaults if None.

  Returns:
    The URL of index.html.

  Raises:
    UserError: if the table is absent, damaged or holds tokens that the
      vocabulary lacks, or an option is out of range.
  """
  config = config or BrowseConfig()
  if not isinstance(features, Features):
    features = features_lib.open(features)
  depends = inputs(report, config)
  edges = features.column('hist_edges')
  out = epath.Path(out_url)
  _clear(out)
  # Name -> digest of each file that is written.
  digests = {}
  for name, content in static.contents().items():
    _write(out, name, content, digests)
  texts = [
    list(token) if isinstance(token, bytes) else token for token in vocabulary
  ]
  _write(out, 'data/vocabulary.json', entries.dumps(texts).encode(), digests)
  columns, previews = _Lists(), _Lists()
  n_alive, hist_H = 0, np.zeros(len(edges) - 1, np.int64)
  for block in _blocks(features, len(vocabulary), str(out), config):
    digests |= block.digests
    columns.add(block.columns)
    previews.add(block.previews)
    n_alive += block.n_alive
    hist_H += block.hist_H
  _write(out, 'data/columns.json', columns.to_json(), digests)
  _write(out, 'data/previews.json', previews.to_json(), digests)
  # Sorted, so that the order of writing does not matter.
  digests = dict(sorted(digests.items()))
  in_use = np.flatnonzero(hist_H)
  meta = {
    'format_version': FORMAT_VERSION,
    'page': static.digest(),
    'title': config.title,
    'build': _identity(digests),
    'n_features': features.n_latents,
    'n_alive': n_alive,
    'features_per_shard': config.features_per_shard,
    'vocabulary_size': len(vocabulary),
    'hist_edges': entries.exact(edges),
    'hist_bins_in_use': (
      [int(in_use[0]), int(in_use[-1]) + 1] if in_use.size else [0, 0]
    ),
    'report': depends['report'],
  }
  _write(out, 'data/meta.json', entries.dumps(meta).encode(), digests)
  # Last, as it makes the page a finished one.
  finished.write(out, depends, dict(sorted(digests.items())))
  return str(out / 'index.html')


def _blocks(
  features: Features, vocabulary_size: int, out_url: str, config: BrowseConfig
) -> Iterator[entries.Block]:
  """The blocks of the table, in order, once their data files are written."""
  size = config.features_per_shard
  job = entries.Job(
    features.url,
    vocabulary_size,
    out_url,
    size,
    config.activation_digits,
    config.label_tokens,
    config.preview_tokens,
  )
  step, stop = max(1, _BLOCK // size) * size, features.n_latents
  spans = [(first, min(first + step, stop)) for first in range(0, stop, step)]
  work = processes.Work(
    'sae_jax.browser.entries:maker',
    job,
    'process of the page',
    'use a machine with more memory, or a smaller --features_per_shard',
  )
  if stop < _FEW:
    blocks = map(work.function(), spans)
  else:
    count = min(_MOST_PROCESSES, len(os.sched_getaffinity(0)))
    jobs = ((None, span) for span in spans)
    blocks = (block for _, block in processes.run(work, jobs, count))
  with progress.bar(total=stop, unit='latent', desc='index') as bar:
    for block in blocks:
      yield block
      bar.update(block.n_latents)


class _Lists:
  """Lists of the page, collected as JSON: objects take ten times as much."""

  def __init__(self):
    self._parts = {}

  def add(self, texts: dict[str, str]) -> None:
    """Appends the entries of a block, name -> JSON without brackets."""
    for name, text in texts.items():
      self._parts.setdefault(name, []).append(text)

  def to_json(self) -> bytes:
    """All lists by name."""
    lists = (f'"{n}":[{",".join(p)}]' for n, p in self._parts.items())
    return f'{{{",".join(lists)}}}'.encode()


def _clear(out: epath.Path) -> None:
  """Removes an older index's record and data, and what a killed build left."""
  finished.remove(out)
  (out / 'data' / 'meta.json').unlink(missing_ok=True)
  shards = out / 'data' / 'features'
  if shards.exists():
    for stale in shards.iterdir():
      if _SHARD.fullmatch(stale.name):
        stale.unlink()
  for folder in (out, out / 'data', shards):
    files.remove_partial(folder)


def _identity(digests: dict[str, str]) -> str:
  """A name of the content of all files."""
  lines = [f'{name} {digest}\n' for name, digest in sorted(digests.items())]
  return hashlib.sha256(''.join(lines).encode()).hexdigest()[:16]


def _plain(value, name):
  """Nested values as JSON types; UserError for a type that JSON lacks."""
  if isinstance(value, dict):
    return {str(k): _plain(v, f'{name}.{k}') for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v, f'{name}[{i}]') for i, v in enumerate(value)]
  if hasattr(value, 'tolist'):
    return _plain(value.tolist(), name)
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if value is None or isinstance(value, str | int):
    return value
  raise errors.UserError(
    f'{name} is a {type(value).__name__}: a report holds numbers, texts, '
    'lists and dicts'
  )


def _write(out, name, data, digests) -> None:
  """Writes a file and notes its digest."""
  files.write_bytes(out / name, data)
  digests[name] = finished.sha256(data)
