"""Reading activations at named sites of the subject, in one pass."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sae_jax.subject import sites as sites_lib
from sae_jax.subject import transformer

Site = sites_lib.Site
check_site = sites_lib.check_site
parse_site = sites_lib.parse_site
width = sites_lib.width

Edits = dict[Site, Callable[[jax.Array], jax.Array]]


class Pass(NamedTuple):
  """What a pass through the subject gives.

  Attributes:
    resid_BTD: the residual stream after the last block that ran.
    recorded: site -> activations there.
    logits_BTV: next-token logits, if they were asked for; T of those tokens.
    cache: the cache with the new positions, if one was given.
  """

  resid_BTD: jax.Array
  recorded: dict[Site, jax.Array]
  logits_BTV: jax.Array | None
  cache: transformer.Cache | None


def run(
  config: transformer.TransformerConfig,
  params: transformer.Params,
  tokens_BT: jax.Array,
  *,
  record: Sequence[Site] = (),
  edits: Edits | None = None,
  n_blocks: int | None = None,
  logits: bool = False,
  logits_at_B: jax.Array | None = None,
  cache: transformer.Cache | None = None,
  first_B: jax.Array | None = None,
) -> Pass:
  """Runs the subject, recording and replacing at sites on the way.

  Args:
    config: the subject's shape, static under jit.
    params: the subject's parameters.
    tokens_BT: int32 token ids, padded on the right with any id.
    record: sites to record; where one is edited too, the replacement.
    edits: site -> function of its activations that replaces them, keeping
      their shape.
    n_blocks: how many blocks to run; None for all.
    logits: whether to go on to the logits.
    logits_at_B: the one token of each sequence, counted here from 0, whose
      logits are wanted; None for those of all.
    cache: keys and values of earlier positions (`transformer.make_cache`).
    first_B: with a cache, the position of each sequence's first token.

  Raises:
    UserError: if the subject has no such site, or too few positions.
  """
  edits = edits or {}
  for site in (*record, *edits):
    check_site(config, site)
  n_blocks = config.n_layers if n_blocks is None else n_blocks
  recorded = {}

  def tap(site, x):
    if site in edits:
      x = edits[site](x).astype(x.dtype)
    if site in record:
      recorded[site] = x
    return x

  resid_BTD = tap(
    Site(None, 'embed'), transformer.embed_tokens(config, params, tokens_BT)
  )
  if config.n_positions:
    found = transformer.embed_positions(
      config, params, tokens_BT.shape[1], first_B
    )
    resid_BTD += tap(
      Site(None, 'pos_embed'), jnp.broadcast_to(found, resid_BTD.shape)
    )
  if not n_blocks:
    resid_BTD = tap(Site(0, 'resid_pre'), resid_BTD)
  for part in _parts(record, edits, n_blocks):
    resid_BTD, taken, cache = transformer.scan_blocks(
      config,
      params,
      resid_BTD,
      part.start,
      part.stop,
      record=part.names,
      edits=part.edits,
      cache=cache,
      first_B=first_B,
    )
    for name, x_LBTD in taken.items():
      for block in range(part.start, part.stop):
        recorded[Site(block, name)] = x_LBTD[block - part.start]
    last = Site(part.stop - 1, 'resid_post')
    if last not in recorded:
      resid_BTD = tap(last, resid_BTD)
  logits_BTV = None
  if logits or Site(None, 'final_norm') in record:
    last_BTD = resid_BTD
    if logits_at_B is not None:
      last_BTD = jnp.take_along_axis(resid_BTD, logits_at_B[:, None, None], 1)
    x_BTD = transformer.final_norm(config, params, last_BTD)
    x_BTD = tap(Site(None, 'final_norm'), x_BTD)
    if logits:
      logits_BTV = transformer.project(config, params, x_BTD)
  return Pass(resid_BTD, recorded, logits_BTV, cache)


class _Part(NamedTuple):
  """Blocks start..stop - 1, alike in what is wanted of them."""

  start: int
  stop: int
  names: frozenset[str]  # recorded inside the scan
  edits: dict[str, Callable[[jax.Array], jax.Array]]


def _parts(
  record: Sequence[Site], edits: Edits, n_blocks: int
) -> Iterator[_Part]:
  """Parts of the stack, as few as there can be: each is compiled once."""
  names = {block: set() for block in range(-1, n_blocks + 1)}
  for site in record:
    if site.block is not None and site.block < n_blocks:
      names[site.block].add(site.name)
  edited = {
    site.block: {
      other.name: edit
      for other, edit in edits.items()
      if other.block == site.block and other.name != 'resid_post'
    }
    for site in edits
  }

  def inside(block):
    # The stream after a part needs no recording inside it.
    alone = 'resid_post' not in names[block - 1] | names[block + 1]
    if alone or Site(block, 'resid_post') in edits:
      return frozenset(names[block] - {'resid_post'})
    return frozenset(names[block])

  start = 0
  for block in range(n_blocks):
    ends = (
      block + 1 == n_blocks
      or inside(block) != inside(block + 1)
      or edited.get(block)
      or edited.get(block + 1)
      or Site(block, 'resid_post') in edits
      or 'resid_post' in names[block] - inside(block)
    )
    if ends:
      yield _Part(start, block + 1, inside(start), edited.get(start, {}))
      start = block + 1


def _blocks_to_run(
  config: transformer.TransformerConfig, sites: Sequence[Site]
) -> int:
  """How many blocks lead to all of the sites."""
  return max(
    (
      {'final_norm': config.n_layers}.get(site.name, 0)
      if site.block is None
      else site.block + (site.name != 'resid_pre')
      for site in sites
    ),
    default=0,
  )


def _recorded_as(site: Site) -> Site:
  """The stream before a block is the one after the block before it."""
  if site.name == 'resid_pre' and site.block:
    return Site(site.block - 1, 'resid_post')
  return site


def capture_many(
  config: transformer.TransformerConfig,
  params: transformer.Params,
  tokens_BT: jax.Array,
  sites: Sequence[Site | str],
) -> dict[str, jax.Array]:
  """Activations at several sites in one pass, which ends at the last one.

  Args:
    config: the subject's shape, static under jit.
    params: the subject's parameters.
    tokens_BT: int32 token ids, padded on the right with any id.
    sites: where to read, static under jit (a tuple): sites, or their names.

  Returns:
    Name, as given (`str(site)` of a Site) -> activations [B, T, width].

  Raises:
    UserError: if a name is not known, or the subject has no such site.
  """
  by_name = {
    str(site): parse_site(site, config) if isinstance(site, str) else site
    for site in sites
  }
  for site in by_name.values():
    check_site(config, site)
  read = {name: _recorded_as(site) for name, site in by_name.items()}
  recorded = run(
    config,
    params,
    tokens_BT,
    record=tuple(dict.fromkeys(read.values())),
    n_blocks=_blocks_to_run(config, list(by_name.values())),
  ).recorded
  return {name: recorded[site] for name, site in read.items()}


def capture(
  config: transformer.TransformerConfig,
  params: transformer.Params,
  tokens_BT: jax.Array,
  site: Site,
) -> jax.Array:
  """Activations at a site, resid_BTD for one of the stream.

  Runs no block beyond it.

  Args:
    config: the subject's shape, static under jit.
    params: the subject's parameters.
    tokens_BT: int32 token ids, padded on the right with any id.
    site: where to read, static under jit.

  Raises:
    UserError: if the subject has no such site.
  """
  return capture_many(config, params, tokens_BT, (site,))[str(site)]
