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
  data/features/00000.json     a shard of `features_per_shard` latents

Numbers that are not finite become null; absent examples, votes and
neighbours (-1 in the arrays) are left out.
"""

import collections
from collections.abc import Sequence
from concurrent import futures
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import re
from typing import Any

from etils import epath
import numpy as np

import sae_jax
from sae_jax import config as config_lib
from sae_jax import errors, progress
from sae_jax import subject as subject_lib
from sae_jax.browser import static
from sae_jax.features import table
from sae_jax.features.table import ARRAYS, MOMENTS
from sae_jax.storage import files, finished

FORMAT_VERSION = 2
# The files of a page, as its record names them.
NAMES = re.compile(r'(data/(features/)?)?\w+\.(html|js|css|svg|json)')
_SHARD = re.compile(r'\d{5,}\.json')
_WRITERS = 8  # threads: a bucket's latency, not its bandwidth, is the bound


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
  features: dict[str, np.ndarray] | epath.PathLike,
  report: dict[str, Any],
  vocabulary: Sequence[str | bytes],
  out_url: epath.PathLike,
  config: BrowseConfig | None = None,
) -> str:
  """Writes the feature page and its data.

  Args:
    features: the feature table (`features.table`), or its path or URL.
    report: the metrics of the autoencoder, as in `report.json`.
    vocabulary: the text of each token id, or its bytes where they are not whole
      characters.
    out_url: folder to write, or its URL; an older index in it is replaced.
    config: options of the page; the defaults if None.

  Returns:
    The URL of index.html.

  Raises:
    UserError: if arrays are absent, disagree in shape or hold tokens that the
      vocabulary lacks, or an option is out of range.
  """
  config = config or BrowseConfig()
  if not isinstance(features, dict):
    features = table.read(features)
  table.check(features, len(vocabulary))
  depends = inputs(report, config)
  out = epath.Path(out_url)
  _clear(out)
  # Name -> digest of each file that is written.
  digests = {}
  for name, content in static.contents().items():
    files.write_bytes(out / name, content)
    digests[name] = finished.sha256(content)
  _write_data(features, vocabulary, config, out, digests)
  build = _identity(digests)
  meta = _meta(features, depends['report'], len(vocabulary), config, build)
  _write(out, 'data/meta.json', meta, digests)
  # Last, as it makes the page a finished one; sorted, as threads write the
  # shards in any order.
  finished.write(out, depends, dict(sorted(digests.items())))
  return str(out / 'index.html')


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


def _write_data(features, vocabulary, config, out, digests) -> None:
  """Writes all data but meta.json."""
  lists = {
    'vocabulary': [
      list(token) if isinstance(token, bytes) else token for token in vocabulary
    ],
    'columns': _columns(features, config),
    'previews': _previews(features, config),
  }
  for name, values in lists.items():
    _write(out, f'data/{name}.json', values, digests)
  _write_shards(features, config, out, digests)


def _meta(features, report, vocabulary_size, config, build) -> dict[str, Any]:
  """The numbers of the whole index."""
  alive = features['count'] > 0
  in_use = np.flatnonzero(features['hist_counts'].sum(axis=0))
  return {
    'format_version': FORMAT_VERSION,
    'page': static.digest(),
    'title': config.title,
    'build': build,
    'n_features': len(alive),
    'n_alive': int(alive.sum()),
    'features_per_shard': config.features_per_shard,
    'vocabulary_size': vocabulary_size,
    'hist_edges': _exact(features['hist_edges']),
    'hist_bins_in_use': (
      [int(in_use[0]), int(in_use[-1]) + 1] if in_use.size else [0, 0]
    ),
    'report': report,
  }


def _columns(features, config):
  """The columns of list and search: name -> one entry per latent."""
  limit = config.label_tokens
  peaks_NM = _at_peak(features['top_tokens'], features['top_peak'])
  top = [
    [token for token, _ in collections.Counter(row).most_common(limit)]
    for row in _present(peaks_NM)
  ]
  return {
    'latent': features['latent_ids'].tolist(),
    'count': features['count'].tolist(),
    **{name: _exact(features[name]) for name in MOMENTS},
    'top': top,
    'votes': [row[:limit] for row in _present(features['vote_up_ids'])],
  }


def _previews(features, config):
  """Tokens around the best example's peak; activations in % of the peak's."""
  width = config.preview_tokens
  tokens, percents = [], []
  for tokens_W, acts_W, peak in zip(
    features['top_tokens'][:, 0],
    features['top_acts'][:, 0],
    features['top_peak'][:, 0],
  ):
    kept_W = tokens_W >= 0
    stop = min(peak + 1 + width // 4, len(kept_W)) if peak >= 0 else 0
    part = slice(max(0, stop - width), stop)
    kept = kept_W[part]
    # In float64, as float32 has no hundred times its largest number.
    acts = acts_W[part][kept].astype(np.float64)
    whole = acts_W[peak] if acts_W[peak] > 0 else np.inf
    shares = 100 * acts / whole
    tokens.append(tokens_W[part][kept].tolist())
    percents.append(np.clip(np.rint(shares), 0, 100).astype(int).tolist())
  return {'tokens': tokens, 'percents': percents}


def _write_shards(features, config, out, digests) -> None:
  """Writes all shards."""
  n_features, size = len(features['latent_ids']), config.features_per_shard

  def write(first):
    shard = [
      _feature(features, row, config.activation_digits)
      for row in range(first, min(first + size, n_features))
    ]
    _write(out, f'data/features/{first // size:05d}.json', shard, digests)

  with (
    progress.bar(total=n_features, unit='latent', desc='index') as bar,
    futures.ThreadPoolExecutor(_WRITERS) as pool,
  ):
    for _ in pool.map(write, range(0, n_features, size)):
      bar.update(min(size, n_features - bar.n))


def _feature(features, row, digits):
  """One latent's entry in a shard."""
  latent = {
    name: features[name][row]
    for name, declared in ARRAYS.items()
    if declared.axes[0] == 'N'
  }
  near = latent['neighbour_ids'] >= 0
  return {
    'latent': int(latent['latent_ids']),
    'histogram': latent['hist_counts'].tolist(),
    **{kind: _examples(latent, kind, digits) for kind in ('top', 'random')},
    **{f'votes_{way}': _votes(latent, way) for way in ('up', 'down')},
    'neighbours': {
      'latents': latent['neighbour_ids'][near].tolist(),
      'cosines': _exact(latent['neighbour_cosines'][near]),
    },
  }


def _examples(latent, kind, digits):
  """Examples of one latent; `fired` are the places with an activation."""
  examples = []
  for tokens_W, acts_W, peak, document in zip(
    *(
      latent[f'{kind}_{name}']
      for name in ('tokens', 'acts', 'peak', 'document')
    )
  ):
    if peak < 0:
      continue
    places = np.flatnonzero(tokens_W >= 0)
    acts = acts_W[places]
    fired = np.flatnonzero(acts)
    examples.append(
      {
        'tokens': tokens_W[places].tolist(),
        'fired': fired.tolist(),
        'acts': _rounded(acts[fired], digits),
        'peak': int(np.searchsorted(places, peak)),
        'document': int(document),
      }
    )
  return examples


def _votes(latent, way):
  ids = latent[f'vote_{way}_ids']
  return {
    'tokens': ids[ids >= 0].tolist(),
    'logits': _exact(latent[f'vote_{way}_logits'][ids >= 0]),
  }


def _at_peak(tokens_NMW, peak_NM):
  """The token at each example's peak, -1 where there is no example."""
  picked_NM1 = np.take_along_axis(
    tokens_NMW, np.maximum(peak_NM, 0)[..., None], axis=2
  )
  return np.where(peak_NM >= 0, picked_NM1[..., 0], -1)


def _present(ids_NM):
  """Rows as lists, their -1 left out."""
  return [[i for i in row if i >= 0] for row in ids_NM.tolist()]


def _exact(values):
  """float32 as the shortest decimals that read back as the same float32."""
  decimals = np.asarray(values, np.float32).astype(str).astype(np.float64)
  return [v if math.isfinite(v) else None for v in decimals.tolist()]


def _rounded(values, digits):
  """Values with `digits` significant digits, null where not finite."""
  return [
    float(f'{v:.{digits}g}') if math.isfinite(v) else None
    for v in values.tolist()
  ]


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


def _write(out, name, values, digests) -> None:
  """Writes compact ASCII JSON and notes its digest."""
  text = json.dumps(values, separators=(',', ':'), allow_nan=False).encode()
  files.write_bytes(out / name, text)
  digests[name] = finished.sha256(text)
