"""The feature index: probing's arrays as small files that a page fetches.

Any server of static files can serve a built folder:

  index.html *.js style.css    the page, copied from `page/`
  data/meta.json               numbers of the whole; written last, so a folder
                               without it is not finished
  data/columns.json            a list per column, one entry per latent, for
                               sorting, filtering and searching
  data/previews.json           a few tokens of each latent's best example
  data/vocabulary.json         token id -> text; other files hold ids alone
  data/features/00000.json     a shard of `features_per_shard` latents

Numbers that are not finite become null; absent examples, votes and
neighbours (-1 in the arrays) are left out.
"""

import collections
from concurrent import futures
import dataclasses
import hashlib
import json
import math
from typing import Any

from etils import epath
import numpy as np

from sae_jax import config as config_lib
from sae_jax import errors, progress
from sae_jax import subject as subject_lib
from sae_jax.features import table
from sae_jax.features.table import ARRAYS, MOMENTS
from sae_jax.storage import files, records

FORMAT_VERSION = 1
_PAGE = epath.Path(__file__).parent / 'page'
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


def build_index(
  features: dict[str, np.ndarray] | epath.PathLike,
  report: dict[str, Any],
  vocabulary: list[str],
  out_url: epath.PathLike,
  config: BrowseConfig | None = None,
) -> str:
  """Writes the feature page and its data.

  Args:
    features: the feature table (`features.table`), or its path or URL.
    report: the metrics of the autoencoder, as in `report.json`.
    vocabulary: the readable text of each token id.
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
  report = _plain(report, 'report')
  out = epath.Path(out_url)
  _write_page(out)
  build = _write_data(features, vocabulary, config, out / 'data')
  # Last, as it makes the folder a finished one.
  meta = _meta(features, report, len(vocabulary), config, build)
  _write(out / 'data' / 'meta.json', meta)
  return str(out / 'index.html')


def _write_page(out: epath.Path) -> None:
  """Writes the page's own files, without the data of an older index."""
  data = out / 'data'
  (data / 'meta.json').unlink(missing_ok=True)
  (data / 'features').mkdir(parents=True, exist_ok=True)
  for stale in (data / 'features').glob('*.json'):
    stale.unlink()
  for source in _PAGE.iterdir():
    if source.is_file():
      files.write_text(out / source.name, source.read_text())


def _write_data(features, vocabulary, config, data: epath.Path) -> str:
  """Writes all data but meta.json; returns a name of the content."""
  identity = hashlib.sha256()
  lists = {
    'vocabulary': vocabulary,
    'columns': _columns(features, config),
    'previews': _previews(features, config),
  }
  for name, values in lists.items():
    identity.update(_write(data / f'{name}.json', values))
  for digest in _write_shards(features, config, data / 'features'):
    identity.update(digest)
  return identity.hexdigest()[:16]


def _meta(features, report, vocabulary_size, config, build) -> dict[str, Any]:
  """The numbers of the whole index."""
  alive = features['count'] > 0
  in_use = np.flatnonzero(features['hist_counts'].sum(axis=0))
  return {
    'format_version': FORMAT_VERSION,
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


def page_digest() -> str:
  """A hex digest of the page's own files: their version."""
  digest = hashlib.sha256()
  for source in sorted(_PAGE.iterdir()):
    if source.is_file():
      digest.update(source.name.encode() + source.read_bytes())
  return digest.hexdigest()


def is_whole(out_url: epath.PathLike) -> bool:
  """Whether every file of a finished page is there."""
  out = epath.Path(out_url)
  meta = records.read(out / 'data' / 'meta.json')
  shards = -(-meta['n_features'] // meta['features_per_shard'])
  names = [source.name for source in _PAGE.iterdir() if source.is_file()]
  names += [f'data/{n}.json' for n in ('vocabulary', 'columns', 'previews')]
  present = {path.name for path in (out / 'data' / 'features').glob('*.json')}
  return all((out / name).exists() for name in names) and present >= {
    f'{shard:05d}.json' for shard in range(shards)
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
    shares = 100 * acts_W[part][kept] / max(acts_W[peak], 1e-30)
    tokens.append(tokens_W[part][kept].tolist())
    percents.append(np.clip(np.rint(shares), 0, 100).astype(int).tolist())
  return {'tokens': tokens, 'percents': percents}


def _write_shards(features, config, folder):
  """Writes all shards; returns their digests in order."""
  n_features, size = len(features['latent_ids']), config.features_per_shard

  def write(first):
    shard = [
      _feature(features, row, config.activation_digits)
      for row in range(first, min(first + size, n_features))
    ]
    return _write(folder / f'{first // size:05d}.json', shard)

  digests = []
  with (
    progress.bar(total=n_features, unit='latent', desc='index') as bar,
    futures.ThreadPoolExecutor(_WRITERS) as pool,
  ):
    for digest in pool.map(write, range(0, n_features, size)):
      digests.append(digest)
      bar.update(min(size, n_features - bar.n))
  return digests


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


def _write(path, values):
  """Writes compact ASCII JSON; returns its digest."""
  text = json.dumps(values, separators=(',', ':'), allow_nan=False)
  files.write_text(path, text)
  return hashlib.sha256(text.encode()).digest()
