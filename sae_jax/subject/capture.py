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
  """The result of a pass through the subject.

  Attributes:
    resid_BTD: the residual stream after the last block that ran.
    recorded: site -> activations there.
    logits_BTV: next-token logits of the requested tokens, or None.
    cache: the cache with the new positions; None if none was given.
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
  """Runs the subject, recording and replacing activations at sites.

  Args:
    config: the subject's shape, static under jit.
    params: the subject's parameters.
    tokens_BT: int32 token ids, padded on the right with any id.
    record: sites to record; of one that is also edited, the replacement.
    edits: site -> function of its activations that replaces them, keeping
      their shape.
    n_blocks: how many blocks to run; None for all.
    logits: whether to compute logits.
    logits_at_B: index of the one token of each sequence to compute them for,
      from 0 within tokens_BT; None for all tokens.
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
    embedded = transformer.embed_positions(
      config, params, tokens_BT.shape[1], first_B
    )
    resid_BTD += tap(
      Site(None, 'pos_embed'), jnp.broadcast_to(embedded, resid_BTD.shape)
    )
  if not n_blocks:
    resid_BTD = tap(Site(0, 'resid_pre'), resid_BTD)
  for blocks in _block_ranges(record, edits, n_blocks):
    resid_BTD, by_name, cache = transformer.scan_blocks(
      config,
      params,
      resid_BTD,
      blocks.start,
      blocks.stop,
      record=blocks.names,
      edits=blocks.edits,
      cache=cache,
      first_B=first_B,
    )
    for name, x_LBTD in by_name.items():
      for block in range(blocks.start, blocks.stop):
        recorded[Site(block, name)] = x_LBTD[block - blocks.start]
    last = Site(blocks.stop - 1, 'resid_post')
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


class _BlockRange(NamedTuple):
  """Blocks start..stop - 1, with the same records and edits in each.

  Attributes:
    start: the first block.
    stop: one past the last block.
    names: names of the sites that are recorded inside the scan.
    edits: name of a site -> function that replaces its activations.
  """

  start: int
  stop: int
  names: frozenset[str]
  edits: dict[str, Callable[[jax.Array], jax.Array]]


def _block_ranges(
  record: Sequence[Site], edits: Edits, n_blocks: int
) -> Iterator[_BlockRange]:
  """The fewest ranges that cover the stack, since each is compiled."""
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
    # The residual stream after a range is at hand without recording.
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
      yield _BlockRange(start, block + 1, inside(start), edited.get(start, {}))
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
  """The site with the same activations: resid_post of the block before."""
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
    Activations [B, T, width] by name, as given, or `str(site)` of a Site.

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
  """Activations at a site, [B, T, width]; runs no block beyond it.

  Args:
    config: the subject's shape, static under jit.
    params: the subject's parameters.
    tokens_BT: int32 token ids, padded on the right with any id.
    site: where to read, static under jit.

  Raises:
    UserError: if the subject has no such site.
  """
  return capture_many(config, params, tokens_BT, (site,))[str(site)]
