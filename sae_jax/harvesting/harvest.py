"""Harvest: documents through the subject into an activation store."""

import contextlib
import dataclasses
import importlib.metadata
import platform
from typing import Any

from absl import logging
import jax
import tokenizers

import sae_jax
from sae_jax import config as config_lib
from sae_jax import errors, progress, store
from sae_jax import mesh as mesh_lib
from sae_jax import subject as subject_lib
from sae_jax.harvesting import config as harvesting_config
from sae_jax.harvesting import cutting, filling, pools
from sae_jax.harvesting import source as source_lib
from sae_jax.harvesting.config import HarvestConfig
from sae_jax.storage import claim
from sae_jax.store import checks, layout
from sae_jax.store import manifest as manifest_lib
from sae_jax.store import writer as writer_lib
from sae_jax.subject import capture
from sae_jax.text import corpus


def harvest(
  config: HarvestConfig,
  store_url: str,
  subject: subject_lib.Subject | None = None,
  process: tuple[int, int] = (0, 1),
) -> store.Manifest | None:
  """Writes the activations of a subject on a corpus to a store.

  Shards that are complete are left as they are, whoever made them, so that an
  interrupted harvest goes on, and ends with the same bytes. A finished store
  with an equal config is left alone; where more tokens are wanted it gets more
  shards, and another version of the manifest.

  Args:
    config: what to harvest.
    store_url: the store's folder, local or in a bucket.
    subject: the language model, if it is loaded already; its name is the
      config's subject.
    process: the number of this process and how many there are, each of which
      makes every so many'th shard. They need not know of each other, and the
      store does not depend on how many there are.

  Returns:
    The store's manifest; None if other processes have not made their shards
    yet, the last of which seals the store.

  Raises:
    UserError: if the config cannot be met, the folder holds another store, is
      in use by another harvest that does not share it, or cannot be written.
  """
  harvesting_config.check(config)
  # Other processes find it by what is recorded, from other folders too.
  config = dataclasses.replace(
    config, subject=subject_lib.recorded_name(config.subject)
  )
  index, count = process
  if not 0 <= index < count:
    raise errors.UserError(
      f'process_index {index} of process_count {count}: count from 0'
    )
  manifest = _finished(config, store_url, subject)
  if manifest is not None:
    return manifest
  mesh = _mesh(config)
  # The text is looked for before the subject is loaded: that takes seconds.
  text = source_lib.documents(config)
  if subject is None:
    subject = subject_lib.load(config.subject, mesh=mesh)
  if subject_lib.recorded_name(subject.name) != config.subject:
    raise errors.UserError(
      f'the subject given is {subject.name}, the config says '
      f'{config.subject}: make them the same'
    )
  sites, width = _sites(config, subject)
  plan = store_plan(config, subject, sites, width)
  checks.check_plan(plan)
  forward = pools.Forward(config, subject, sites, mesh)
  # Closed, so that no process that tokenizes is left.
  with (
    contextlib.closing(source_lib.contexts(config, text, subject)) as contexts,
    claim.claim(store_url, shared=count > 1),
  ):
    # Another process may have finished it since.
    manifest = _finished(config, store_url, subject)
    if manifest is not None:
      return manifest
    writer = writer_lib.StoreWriter(store_url, plan)
    shards = cutting.Shards(config, contexts, writer)
    first = shards.first_pool()
    if not first:
      raise nothing_kept(config)
    mask, fitted = forward.fit_mask(first, writer)
    with progress.bar(total=config.n_tokens, unit='tok', desc='harvest') as bar:
      work = shards.missing(process, bar)
      filling.write(config, forward, work, fitted, mask, writer, bar)
    complete = writer.complete(shards.number)
    if complete is None:
      logging.info(
        'store %s: all shards of process %d of %d are there, others are not',
        writer.url,
        *process,
      )
      return None
    medians = dict(zip(plan.sites, mask.median_norm))
    return seal(config, shards.expected, complete, medians, writer)


def _finished(
  config: HarvestConfig, store_url: str, subject: subject_lib.Subject | None
) -> store.Manifest | None:
  """The manifest of a store that has all that is wanted, None of another."""
  finished = layout.read_manifest(store_url)
  if finished is None or _more(config, store_url, finished, subject):
    return None
  logging.info(
    'store %s is finished: %d rows, nothing to do', store_url, finished.n_rows
  )
  return finished


def _sites(
  config: HarvestConfig, subject: subject_lib.Subject
) -> tuple[tuple[capture.Site, ...], int]:
  """The sites that are read, and the width of each.

  Raises:
    UserError: if the subject has no such site, one is named twice, or widths
      differ.
  """
  sites = [capture.parse_site(site, subject.config) for site in config.sites]
  if not sites:
    raise errors.UserError('sites is empty: name one or more')
  if len(set(sites)) < len(sites):
    raise errors.UserError(
      f'sites {", ".join(config.sites)} name one twice: name each once'
    )
  widths = []
  for site in sites:
    capture.check_site(subject.config, site)
    widths.append(capture.width(subject.config, site))
    if widths[-1] != widths[0]:
      raise errors.UserError(
        f'site {site} is {widths[-1]} wide, {sites[0]} is {widths[0]}: a store '
        'has one width, harvest them apart'
      )
  return tuple(sites), widths[0]


def store_plan(
  config: HarvestConfig,
  subject: subject_lib.Subject,
  sites: tuple[capture.Site, ...],
  width: int,
) -> manifest_lib.StorePlan:
  """What every shard of the store depends on."""
  outside_shards = (
    *config_lib.names_with(HarvestConfig, 'sizes_store'),
    *config_lib.names_with(HarvestConfig, 'speed_only'),
  )
  return manifest_lib.StorePlan(
    subject=config.subject,
    weights_sha256=subject.weights_sha256,
    # By one name, whichever was given.
    sites=tuple(map(str, sites)),
    d_model=width,
    dtype=config.dtype,
    chunk_rows=config.chunk_rows,
    shard_rows=config.shard_rows,
    context_length=config.context_length,
    sources=config.sources,
    corpus={source: corpus.identity(source) for source in config.sources},
    tokenizer_sha256=_tokenizer_digest(subject.tokenizer),
    bos=source_lib.bos_text(config, subject.tokenizer),
    seed=config.seed,
    config={
      name: value
      for name, value in dataclasses.asdict(config).items()
      if name not in outside_shards
    },
    software=_software(config),
  )


def _mesh(config: HarvestConfig) -> jax.sharding.Mesh:
  """Devices of this process: all of them, or as many as are asked for."""
  devices = jax.local_devices()
  if config.mesh_data:
    devices = devices[: config.mesh_data * config.mesh_latent]
  return mesh_lib.make_mesh(config.mesh_data, config.mesh_latent, devices)


def seal(
  config: HarvestConfig,
  expected: int,
  complete: list[manifest_lib.Shard],
  medians: dict[str, float],
  writer: writer_lib.StoreWriter,
) -> store.Manifest:
  """Writes the manifest.

  Args:
    config: of the harvest.
    expected: rows that there should be, before the norm rule.
    complete: the records of all shards.
    medians: the median norm at each site, to which limits on norms refer.
    writer: of the store.

  Raises:
    UserError: if no token was kept, or documents cannot be held out.
  """
  n_rows = sum(record.rows for record in complete)
  if not n_rows:
    raise nothing_kept(config)
  bad = sum(record.masked.get('nonfinite', 0) for record in complete)
  if bad:
    tokens = n_rows + sum(
      n
      for record in complete
      for rule, n in record.masked.items()
      if rule != 'first'
    )
    logging.warning(
      '%d of %d activations (%.3g %%) are not finite: the store leaves them '
      "out; check the subject's weights",
      bad,
      tokens,
      100 * bad / tokens,
    )
  if expected < config.n_tokens:
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
      'median_norm': medians,
    },
    sizes={
      name: getattr(config, name)
      for name in config_lib.names_with(HarvestConfig, 'sizes_store')
    },
  )


def nothing_kept(config: HarvestConfig) -> errors.UserError:
  return errors.UserError(
    f'no token of {", ".join(config.sources)} was kept: use longer texts or '
    f'a min_context_tokens below {config.min_context_tokens}'
  )


def _more(config, store_url, finished, subject) -> bool:
  """Whether more is wanted than a finished store has.

  Raises:
    UserError: if it is another store.
  """
  if subject is not None:
    manifest_lib.check_subject(
      finished, store_url, subject.name, subject.weights_sha256
    )
  old = config_lib.from_dict(
    HarvestConfig, finished.config, f'the config of store {store_url}'
  )
  # Older stores may hold a relative path.
  old = dataclasses.replace(old, subject=subject_lib.recorded_name(old.subject))
  longer = config.n_tokens > old.n_tokens
  same = {
    name: getattr(config, name)
    for name in config_lib.names_with(HarvestConfig, 'speed_only')
  }
  if longer:
    same['n_tokens'] = config.n_tokens
    # Bad rows, where they ended a harvest, are in none of its shards.
    same['skip_bad_rows'] = config.skip_bad_rows
  changes = config_lib.differences(dataclasses.replace(old, **same), config)
  if changes:
    raise errors.UserError(
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
