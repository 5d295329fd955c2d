"""Harvest: documents through the subject into an activation store."""

from collections.abc import Iterator
import dataclasses
import functools
import importlib.metadata
import math
import platform
from typing import Any, NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

import sae_jax
from sae_jax import config as config_lib
from sae_jax import progress
from sae_jax import subject as subject_lib
from sae_jax.activations import corpus, layout
from sae_jax.activations import store as store_lib
from sae_jax.subject import capture

option = config_lib.option

# Contexts are grouped by length within so many batches; the stream keeps
# their order.
_POOL_BATCHES = 8
# Batches are padded to one of so many lengths, each compiled once.
_LENGTHS = 4
# To judge a document's size before it is tokenized.
_CHARACTERS_PER_TOKEN = 4


@dataclasses.dataclass(frozen=True)
class HarvestConfig(config_lib.Config):
  """What to harvest; equal configs give equal stores."""

  subject: str = option(
    'smollm2-135m', 'name of a packaged subject, or path of a .gguf file'
  )
  site: str = option(
    'blocks.14.resid_post', 'where in the subject to read activations'
  )
  sources: tuple[str, ...] = option(
    ('sae-probes', 'movie-reviews', 'python-stdlib'),
    'text sources, mixed evenly: these names, or .txt and .jsonl files '
    '(.gz, .zst)',
  )
  n_tokens: int = option(
    100_000, 'activations wanted; the last context is stored whole', least=1
  )
  context_length: int = option(128, 'tokens the subject sees at once', least=1)
  max_contexts_per_document: int = option(
    8, 'contexts a document gives at most, so that none dominates', least=1
  )
  min_context_tokens: int = option(8, 'shorter contexts are skipped', least=1)
  batch_contexts: int = option(16, 'contexts in a forward pass', least=1)
  dtype: str = option(
    'float32', 'of the stored activations', ('float32', 'bfloat16')
  )
  chunk_rows: int = option(1024, 'rows of the smallest read', least=1)
  shard_rows: int = option(65_536, 'rows of a stored object', least=1)
  holdout_fraction: float = option(
    0.1, 'share of the rows kept from training: the last documents'
  )
  mask_first: bool = option(
    True, 'leave out the first token of each context, an attention sink'
  )
  mask_norm_multiple: float = option(
    10.0,
    'leave out tokens whose norm is beyond this multiple of the median; 0 '
    'keeps all',
  )
  seed: int = option(0, 'sets the order of documents')


class _Context(NamedTuple):
  document: int
  source: str
  tokens: np.ndarray


class _Mask(NamedTuple):
  """Which norms are kept, fixed by the first pool of contexts."""

  median_norm: float
  norm_limit: float


def harvest(
  config: HarvestConfig,
  store_url: str,
  subject: subject_lib.Subject | None = None,
) -> store_lib.Manifest:
  """Writes the activations of a subject on a corpus to a store.

  A finished store with an equal config is left as it is; an unfinished one is
  started again.

  Args:
    config: what to harvest.
    store_url: the store's folder, local or gs://.
    subject: the language model, if it is loaded already; its name is the
      config's subject.

  Returns:
    The store's manifest.

  Raises:
    UserError: if the config cannot be met, a finished store has another one,
      or the store cannot be written.
  """
  _check(config)
  finished = layout.read_manifest(store_url)
  if finished is not None:
    _check_same(config, store_url, finished, subject)
    logging.info(
      'store %s is finished: %d rows, nothing to do', store_url, finished.n_rows
    )
    return finished
  site = capture.parse_site(config.site)
  # The text is looked for before the subject is loaded: that takes seconds.
  documents = corpus.documents(
    config.sources,
    config.seed,
    config.max_contexts_per_document
    * config.context_length
    * _CHARACTERS_PER_TOKEN,
  )
  if subject is None:
    subject = subject_lib.load(config.subject)
  if subject.name != config.subject:
    raise config_lib.UserError(
      f'the subject given is {subject.name}, the config says '
      f'{config.subject}: make them the same'
    )
  capture.check_site(subject.config, site)
  with store_lib.StoreWriter(
    store_url,
    subject.config.d_model,
    config.dtype,
    config.chunk_rows,
    config.shard_rows,
  ) as writer:
    contexts = _contexts(config, documents, subject.tokenizer)
    return _run(config, subject, site, contexts, writer)


def _run(config, subject, site, contexts, writer) -> store_lib.Manifest:
  """The loop: pool n is dispatched, then pool n - 1 is stored."""
  mask, masked = None, {'first': 0, 'norm': 0}
  source_rows = dict.fromkeys(config.sources, 0)
  row_documents = []
  waiting, expected = None, 0
  with progress.bar(total=config.n_tokens, unit='tok', desc='harvest') as bar:
    while waiting is not None or writer.n_rows < config.n_tokens:
      pool = _take(config, contexts, config.n_tokens - writer.n_rows - expected)
      running = _dispatch(config, subject, site, pool) if pool else None
      if waiting is not None:
        mask, counts = _store(config, writer, mask, bar, *waiting)
        for context, kept in zip(waiting[0], counts['kept']):
          source_rows[context.source] += kept
          row_documents.append((context.document, kept))
        for rule in masked:
          masked[rule] += counts[rule]
      elif running is None:
        break
      waiting = running
      expected = sum(_expected(config, context) for context in pool)
  if not writer.n_rows:
    raise config_lib.UserError(
      f'no token of {", ".join(config.sources)} was kept: use longer texts or '
      f'a min_context_tokens below {config.min_context_tokens}'
    )
  if writer.n_rows < config.n_tokens:
    logging.warning(
      'the sources gave %d of %d tokens: the store is smaller than asked for',
      writer.n_rows,
      config.n_tokens,
    )
  return writer.finish(
    subject=config.subject,
    weights_sha256=subject.weights_sha256,
    site=config.site,
    holdout_rows=_holdout_rows(config, row_documents),
    context_length=config.context_length,
    sources=config.sources,
    source_rows=source_rows,
    seed=config.seed,
    mask={
      'rule': 'position 0 if mask_first; norm > norm_multiple x median_norm, '
      'or not finite',
      'mask_first': config.mask_first,
      'norm_multiple': config.mask_norm_multiple,
      'median_norm': mask.median_norm,
      'masked_first': masked['first'],
      'masked_norm': masked['norm'],
    },
    config=dataclasses.asdict(config),
    software=_software(config),
  )


def _check(config: HarvestConfig) -> None:
  if not 0 <= config.holdout_fraction < 1:
    raise config_lib.UserError(
      f'holdout_fraction {config.holdout_fraction} must be at least 0 and '
      'below 1'
    )
  if config.mask_norm_multiple != 0 and not config.mask_norm_multiple > 1:
    raise config_lib.UserError(
      f'mask_norm_multiple {config.mask_norm_multiple} must be above 1, or 0 '
      'to keep all tokens'
    )
  if config.mask_first and config.context_length < 2:
    raise config_lib.UserError(
      f'context_length {config.context_length} with mask_first leaves no '
      'token: use 2 or more'
    )
  if config.min_context_tokens > config.context_length:
    raise config_lib.UserError(
      f'min_context_tokens {config.min_context_tokens} is above '
      f'context_length {config.context_length}: no context would be left'
    )


def _check_same(config, store_url, finished, subject) -> None:
  old = config_lib.from_dict(HarvestConfig, finished.config)
  changes = config_lib.differences(old, config)
  if subject is not None and subject.weights_sha256 != finished.weights_sha256:
    changes.append(
      f'weights_sha256: {finished.weights_sha256} -> {subject.weights_sha256}'
    )
  if changes:
    raise config_lib.UserError(
      f'store {store_url} is finished with another config '
      f'({"; ".join(changes)}): use another folder or delete this one'
    )


def _contexts(config, documents, tokenizer) -> Iterator[_Context]:
  number = 0
  for document in documents:
    tokens = np.asarray(tokenizer.encode(document.text).ids, np.int32)
    length = config.context_length
    starts = range(0, len(tokens), length)[: config.max_contexts_per_document]
    pieces = [tokens[start : start + length] for start in starts]
    pieces = [p for p in pieces if len(p) >= config.min_context_tokens]
    for piece in pieces:
      yield _Context(number, document.source, piece)
    number += bool(pieces)


def _expected(config: HarvestConfig, context: _Context) -> int:
  return len(context.tokens) - config.mask_first


def _take(config, contexts, wanted: int) -> list[_Context]:
  """Contexts of some batches, or as few as should give the tokens wanted."""
  pool = []
  while wanted > 0 and len(pool) < _POOL_BATCHES * config.batch_contexts:
    context = next(contexts, None)
    if context is None:
      break
    pool.append(context)
    wanted -= _expected(config, context)
  return pool


@functools.partial(jax.jit, static_argnames=('config', 'site', 'dtype'))
def _residuals(config, params, tokens_BT, site, dtype):
  resid_BTD = capture.capture(config, params, tokens_BT, site)
  norm_BT = jnp.linalg.norm(resid_BTD.astype(jnp.float32), axis=-1)
  return resid_BTD.astype(dtype), norm_BT


def _dispatch(config, subject, site, pool):
  """Starts the forward passes of a pool, contexts of like length together."""
  unit = math.ceil(config.context_length / _LENGTHS)
  by_length = sorted(range(len(pool)), key=lambda i: -len(pool[i].tokens))
  batches = []
  for start in range(0, len(pool), config.batch_contexts):
    batch = by_length[start : start + config.batch_contexts]
    longest = len(pool[batch[0]].tokens)
    length = min(math.ceil(longest / unit) * unit, config.context_length)
    tokens_BT = np.zeros((config.batch_contexts, length), np.int32)
    for row, i in enumerate(batch):
      tokens_BT[row, : len(pool[i].tokens)] = pool[i].tokens
    outputs = _residuals(
      subject.config, subject.params, tokens_BT, site, config.dtype
    )
    batches.append((batch, outputs))
  return pool, batches


def _store(config, writer, mask, bar, pool, batches):
  """Appends a pool in stream order; returns the mask and what it counted."""
  resid, norms = [None] * len(pool), [None] * len(pool)
  for batch, (resid_BTD, norm_BT) in batches:
    resid_BTD, norm_BT = np.asarray(resid_BTD), np.asarray(norm_BT)
    for row, i in enumerate(batch):
      length = len(pool[i].tokens)
      resid[i], norms[i] = resid_BTD[row, :length], norm_BT[row, :length]
    bar.update(sum(_expected(config, pool[i]) for i in batch))
  lengths = [len(context.tokens) for context in pool]
  positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
  norms = np.concatenate(norms)
  allowed = positions > 0 if config.mask_first else np.ones(len(norms), bool)
  if mask is None:
    mask = _fit_mask(config, norms[allowed])
  keep = allowed & np.isfinite(norms) & (norms <= mask.norm_limit)
  resid = np.concatenate(resid)
  writer.append(
    np.concatenate([context.tokens for context in pool]),
    np.repeat([context.document for context in pool], lengths),
    positions,
    keep,
    resid[keep],
  )
  bar.update(writer.n_rows - bar.n)  # The norm rule may have left some out.
  ends = np.cumsum(lengths)[:-1]
  counts = {
    'kept': [int(part.sum()) for part in np.split(keep, ends)],
    'first': int((~allowed).sum()),
    'norm': int((allowed & ~keep).sum()),
  }
  return mask, counts


def _fit_mask(config: HarvestConfig, norms: np.ndarray) -> _Mask:
  norms = norms[np.isfinite(norms)]
  if not len(norms):
    raise config_lib.UserError(
      f'no activation at {config.site} of the first contexts is finite: '
      "check the subject's weights"
    )
  median = float(np.median(norms))
  multiple = config.mask_norm_multiple
  limit = multiple * median if multiple else math.inf
  return _Mask(median, limit)


def _holdout_rows(
  config: HarvestConfig, row_documents: list[tuple[int, int]]
) -> int:
  """Rows of the last documents, the fewest that are the share wanted."""
  rows_by_document = {}
  for document, rows in row_documents:
    rows_by_document[document] = rows_by_document.get(document, 0) + rows
  total = sum(rows_by_document.values())
  holdout = 0
  for rows in reversed(rows_by_document.values()):
    if holdout >= config.holdout_fraction * total:
      break
    holdout += rows
  if holdout == total:
    raise config_lib.UserError(
      f'{len(rows_by_document)} documents cannot be split with '
      f'holdout_fraction {config.holdout_fraction}: use more or shorter ones, '
      'or a smaller fraction'
    )
  return holdout


def _software(config: HarvestConfig) -> dict[str, Any]:
  versions = {
    'sae_jax': sae_jax.__version__,
    'python': platform.python_version(),
  }
  packages = ['jax', 'numpy', 'tensorstore', 'tokenizers']
  packages += [s for s in config.sources if s in corpus.PACKAGES]
  for name in packages:
    versions[name] = importlib.metadata.version(name)
  return versions
