"""A store's descriptions of itself: plan, records of shards, mask, manifest.

Each is a JSON file with a sha256 of its other fields, which is compared when it
is read. Those of older stores may lack it.
"""

import bisect
from collections.abc import Callable, Iterable, Sequence
import dataclasses
import hashlib
import json
from typing import Any

import ml_dtypes
import numpy as np

from sae_jax import errors
from sae_jax.storage import signed

FORMAT_VERSION = 3
# The key of the records among the checksums.
RECORDS = 'shards'
DTYPES = {'float32': np.dtype('<f4'), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}
# Tokens of the stream that a shard has room for, for each row: more than one,
# since the stream includes the tokens that the mask leaves out.
STREAM_PER_ROW = 2


@dataclasses.dataclass(frozen=True)
class StorePlan:
  """What all shards of a store have in common; `plan.json`, written first.

  Attributes:
    subject: name or path the subject was loaded by.
    sites: names of the sites that were read.
    d_model: D.
    weights_sha256: digest of the subject's file.
    dtype: type of the stored activations.
    chunk_rows: rows of an inner chunk.
    shard_rows: rows that a shard has room for.
    context_length: tokens in the longest context.
    sources: names of the text sources.
    corpus: source -> its `corpus.identity`.
    tokenizer_sha256: digest of the tokenizer's JSON; empty if it has none.
    bos: the token that every context begins with; empty for none.
    seed: seed of the order of documents.
    config: fields of the harvest's config that shards depend on.
    software: name -> version of the software that wrote it.
    format_version: version of the store's layout.
  """

  subject: str
  sites: tuple[str, ...]
  d_model: int
  weights_sha256: str = ''
  dtype: str = 'float32'
  chunk_rows: int = 1024
  shard_rows: int = 65_536
  context_length: int = 0
  sources: tuple[str, ...] = ()
  corpus: dict[str, str] = dataclasses.field(default_factory=dict)
  tokenizer_sha256: str = ''
  bos: str = ''
  seed: int = 0
  config: dict[str, Any] = dataclasses.field(default_factory=dict)
  software: dict[str, str] = dataclasses.field(default_factory=dict)
  format_version: int = FORMAT_VERSION

  @property
  def shard_stream(self) -> int:
    """Tokens of the stream that a shard has room for."""
    return STREAM_PER_ROW * self.shard_rows


@dataclasses.dataclass(frozen=True)
class Shard:
  """One complete shard: an object of each array; `shards/000000.json`.

  Attributes:
    rows: rows that it holds, at most the plan's shard_rows.
    stream: tokens of the stream that it holds.
    contexts: contexts that these tokens form.
    documents: (document, rows of it in this shard) in order.
    source_rows: source -> rows that came from it.
    masked: rule -> tokens that the rule left out.
    checksums: array -> sha256 of its little-endian bytes in row order.
  """

  rows: int
  stream: int
  contexts: int
  documents: tuple[tuple[int, int], ...]
  source_rows: dict[str, int]
  masked: dict[str, int]
  checksums: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Manifest:
  """Content and origin of a sealed store; `manifest.json`.

  Fields that are not listed here are those of `StorePlan`; `config` is whole.

  Attributes:
    version: 1, and one more each time shards were appended.
    n_rows: R, kept tokens.
    n_stream: L, tokens of the stream.
    holdout_rows: number of held-out rows, the last ones; the first of them
      begins a document. `first_test_row` divides them.
    shard_counts: rows and tokens of the stream of each shard.
    source_rows: source -> rows that came from it.
    mask: the rule by which tokens were left out, and how many were.
    checksums: array -> sha256 of each shard's little-endian bytes in row order;
      under 'shards', the digest of each shard's record.
    identity: sha256 over all other fields but `software`.
  """

  format_version: int
  version: int
  subject: str
  weights_sha256: str
  sites: tuple[str, ...]
  d_model: int
  dtype: str
  n_rows: int
  n_stream: int
  holdout_rows: int
  chunk_rows: int
  shard_rows: int
  shard_counts: tuple[tuple[int, int], ...]
  context_length: int
  sources: tuple[str, ...]
  corpus: dict[str, str]
  tokenizer_sha256: str
  source_rows: dict[str, int]
  seed: int
  mask: dict[str, Any]
  config: dict[str, Any]
  checksums: dict[str, tuple[str, ...]]
  software: dict[str, str]
  identity: str = ''
  bos: str = ''


def identity(content: dict[str, Any]) -> str:
  """The sha256 of a manifest's fields, without `software` and the identity."""
  content = {
    name: value
    for name, value in content.items()
    if name not in ('software', 'identity')
    # As in stores that were made without the field.
    and not (name == 'bos' and not value)
  }
  return sha256(json.dumps(content, sort_keys=True).encode())


def check_subject(
  manifest: Manifest, url: str, name: str, weights_sha256: str
) -> None:
  """Raises UserError if a store was not harvested from this subject.

  Args:
    manifest: the store's.
    url: where it is.
    name: name of the subject.
    weights_sha256: digest of its weights.
  """
  if weights_sha256 != manifest.weights_sha256:
    raise errors.UserError(
      f'subject {name} is not the model store {url} was harvested from: use '
      f'{manifest.subject} as it was'
    )


def make(
  plan: StorePlan,
  shards: Sequence[Shard],
  *,
  version: int,
  holdout_rows: int = 0,
  mask: dict[str, Any] | None = None,
  sizes: dict[str, Any] | None = None,
) -> Manifest:
  """The manifest of a store.

  Args:
    plan: what the shards have in common.
    shards: the records of all shards.
    version: version of the manifest.
    holdout_rows: how many of the last rows are held out.
    mask: the rule by which tokens were left out; their numbers are added.
    sizes: fields of the harvest's config that size the store, which the plan
      does not have.
  """
  fields = dataclasses.asdict(plan)
  fields['config'] = fields['config'] | (sizes or {})
  masked = _summed(shard.masked for shard in shards)
  names = shards[0].checksums if shards else ()
  checksums = {
    name: tuple(shard.checksums[name] for shard in shards) for name in names
  }
  checksums[RECORDS] = tuple(
    signed.digest(dataclasses.asdict(shard)) for shard in shards
  )
  manifest = Manifest(
    version=version,
    n_rows=sum(shard.rows for shard in shards),
    n_stream=sum(shard.stream for shard in shards),
    holdout_rows=holdout_rows,
    shard_counts=tuple((shard.rows, shard.stream) for shard in shards),
    source_rows=_summed(shard.source_rows for shard in shards),
    mask=(mask or {}) | {f'masked_{rule}': n for rule, n in masked.items()},
    checksums=checksums,
    **fields,
  )
  content = dataclasses.asdict(manifest)
  return dataclasses.replace(manifest, identity=identity(content))


def sha256(data: np.ndarray | bytes) -> str:
  """The sha256 of bytes, or of an array's little-endian bytes in row order."""
  if not isinstance(data, bytes):
    data = np.ascontiguousarray(data).view(np.uint8)
  return hashlib.sha256(data).hexdigest()


def _summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
  total = {}
  for count in counts:
    for name, n in count.items():
      total[name] = total.get(name, 0) + n
  return total


def holdout_rows(shards: Sequence[Shard], fraction: float) -> int:
  """Rows of the fewest last documents that are this fraction of all rows.

  They are two or more, for validation and for the test, unless the fraction is
  0.

  Raises:
    UserError: if that is all documents.
  """
  rows_by_document = {}
  for shard in shards:
    for document, rows in shard.documents:
      rows_by_document[document] = rows_by_document.get(document, 0) + rows
  total = sum(rows_by_document.values())
  if not fraction:
    return 0
  holdout = 0
  for number, rows in enumerate(reversed(rows_by_document.values())):
    if number > 1 and holdout >= fraction * total:
      break
    holdout += rows
  if holdout == total:
    raise errors.UserError(
      f'{len(rows_by_document)} documents cannot be split into training, '
      f'validation and test with holdout_fraction {fraction}: use more or '
      'shorter ones, 3 at the least, or a smaller fraction, or 0'
    )
  return holdout


def first_test_row(
  manifest: Manifest, document: Callable[[int], int]
) -> int | None:
  """The held-out row with which the test begins; those before validate.

  It begins the document whose beginning is the nearest to the middle of the
  held-out rows, the earlier one of two.

  Args:
    manifest: of a store with held-out rows.
    document: number of the document that a row is of, never descending.

  Returns:
    The row; None if all held-out rows are of one document.
  """
  first, stop = manifest.n_rows - manifest.holdout_rows, manifest.n_rows
  middle, rows = (first + stop) // 2, range(stop)
  number = document(middle)
  begins = (
    bisect.bisect_left(rows, number, first, middle, key=document),
    bisect.bisect_right(rows, number, middle, key=document),
  )
  inside = [row for row in begins if first < row < stop]
  return min(inside, key=lambda row: abs(2 * row - first - stop), default=None)


@dataclasses.dataclass(frozen=True)
class Mask:
  """Per-site norm limits, fitted on the first pool and stored as `mask.json`.

  Attributes:
    median_norm: median norm of each site's activations, in the sites' order.
    norm_limit: largest norm that is kept, of each site; None for no limit.
  """

  median_norm: tuple[float, ...]
  norm_limit: tuple[float | None, ...]


def make_mask(median_norm: Sequence[float], norm_multiple: float) -> Mask:
  """The mask with limits of a number of medians, or of none if it is 0."""
  return Mask(
    tuple(median_norm),
    tuple(
      norm_multiple * median if norm_multiple else None
      for median in median_norm
    ),
  )
