"""The decoder-only transformer whose activations are read.

One program runs all families; they differ in switches of `TransformerConfig`.
Functions are pure, of a static config and a nested dict of arrays; blocks are
stacked and scanned. `architecture` has the key of the axes.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sae_jax import errors
from sae_jax.subject import architecture, block

Cache = block.Cache
Params = architecture.Params
RopeScaling = architecture.RopeScaling
TransformerConfig = architecture.TransformerConfig
init = architecture.init
param_shapes = architecture.param_shapes


class BlocksOutput(NamedTuple):
  """The result of `scan_blocks`.

  Attributes:
    resid_BTD: the residual stream after the last block.
    recorded: site name -> its activations, [blocks, B, T, width].
    cache: the cache with the new positions; None if none was given.
  """

  resid_BTD: jax.Array
  recorded: dict[str, jax.Array]
  cache: Cache | None


def embed_tokens(
  config: TransformerConfig, params: Params, tokens_BT: jax.Array
) -> jax.Array:
  """Token ids -> embedded tokens, scaled, without positions."""
  resid_BTD = params['embed'][tokens_BT]
  if config.embed_scale != 1:
    # Rounded to the embedding's type, as when the models were trained.
    resid_BTD *= jnp.asarray(config.embed_scale, resid_BTD.dtype)
  return resid_BTD


def embed_positions(
  config: TransformerConfig,
  params: Params,
  n_positions: int,
  first_B: jax.Array | None = None,
) -> jax.Array:
  """Learned positions, [1 or B, T, D], of a model that has them.

  Raises:
    UserError: if there are more positions than the table has.
  """
  if n_positions > config.n_positions:
    raise errors.UserError(
      f'{n_positions} tokens are more than the {config.n_positions} positions '
      'of this subject: use shorter sequences'
    )
  position_BT = jnp.arange(n_positions)[None]
  if first_B is not None:
    position_BT += first_B[:, None]
  return params['positions'][position_BT]


def embed(
  config: TransformerConfig, params: Params, tokens_BT: jax.Array
) -> jax.Array:
  """Token ids -> resid_BTD, the residual stream before block 0."""
  resid_BTD = embed_tokens(config, params, tokens_BT)
  if config.n_positions:
    resid_BTD += embed_positions(config, params, tokens_BT.shape[1])
  return resid_BTD


def scan_blocks(
  config: TransformerConfig,
  params: Params,
  resid_BTD: jax.Array,
  start: int,
  stop: int,
  *,
  record: frozenset[str] = frozenset(),
  edits: dict[str, Callable[[jax.Array], jax.Array]] | None = None,
  cache: Cache | None = None,
  first_B: jax.Array | None = None,
) -> BlocksOutput:
  """Applies blocks start..stop - 1, recording or replacing on the way.

  Args:
    config: the transformer's shape.
    params: its parameters.
    resid_BTD: the residual stream before block `start`.
    start: first block, 0-based.
    stop: one past the last block; `start` again returns the input.
    record: names of sites (`sites.KINDS`) to record in each of these blocks.
    edits: name of a site -> function of its activations that replaces them, in
      each of these blocks; the replacement is recorded.
    cache: keys and values of earlier positions of the sequences, or None.
    first_B: with a cache, the position of each sequence's first token here.
  """
  queries = block.queries_of(config, resid_BTD.shape[1], cache, first_B)
  layers = block.layers(config)

  def step(carry, index):
    resid_BTD, cache = carry
    weights, layer = jax.tree.map(
      functools.partial(
        jax.lax.dynamic_index_in_dim, index=index, keepdims=False
      ),
      (params['blocks'], layers),
    )
    recorded = {}

    def tap(name, x):
      if edits and name in edits:
        x = edits[name](x).astype(x.dtype)
      if name in record:
        recorded[name] = x
      return x

    resid_BTD, cache = block.apply(
      config, weights, layer, queries, resid_BTD, tap, index, cache
    )
    return (resid_BTD, cache), recorded

  # Scanning over indices, not slices, avoids a copy of blocks start..stop.
  (resid_BTD, cache), recorded = jax.lax.scan(
    step, (resid_BTD, cache), jnp.arange(start, stop)
  )
  return BlocksOutput(resid_BTD, recorded, cache)


def run_blocks(
  config: TransformerConfig,
  params: Params,
  resid_BTD: jax.Array,
  start: int,
  stop: int,
) -> jax.Array:
  """Applies blocks start..stop - 1 to the residual stream.

  Positions count from 0 in every sequence and attention is causal, so right
  padding changes nothing before it. Running a..b and then b..c equals running
  a..c: bit for bit on a CPU, elsewhere unless the compiler rounds a block
  differently in the two.

  Args:
    config: the transformer's shape.
    params: its parameters.
    resid_BTD: the residual stream before block `start`.
    start: first block, 0-based.
    stop: one past the last block; `start` again returns the input.

  Returns:
    resid_BTD after block stop - 1.
  """
  return scan_blocks(config, params, resid_BTD, start, stop).resid_BTD


def final_norm(
  config: TransformerConfig, params: Params, resid_BTD: jax.Array
) -> jax.Array:
  """The last residual stream -> the normed stream that is unembedded."""
  return block.norm(config, params, 'final_norm', resid_BTD)


def project(
  config: TransformerConfig, params: Params, x_BTD: jax.Array
) -> jax.Array:
  """The normed stream -> next-token logits_BTV."""
  unembed_VD = params.get('unembed', params['embed'])
  logits_BTV = jnp.einsum('BTD,VD->BTV', x_BTD, unembed_VD)
  if config.final_softcap:
    cap = config.final_softcap
    logits_BTV = cap * jnp.tanh(logits_BTV / cap)
  return logits_BTV


def unembed(
  config: TransformerConfig, params: Params, resid_BTD: jax.Array
) -> jax.Array:
  """The last residual stream -> next-token logits_BTV, norm included."""
  return project(config, params, final_norm(config, params, resid_BTD))


def forward(
  config: TransformerConfig, params: Params, tokens_BT: jax.Array
) -> jax.Array:
  """Token ids -> next-token logits_BTV.

  Args:
    config: the transformer's shape, static under jit.
    params: arrays shaped as `param_shapes(config)`.
    tokens_BT: int32 ids in [0, V); pad on the right with any id.
  """
  resid_BTD = embed(config, params, tokens_BT)
  resid_BTD = run_blocks(config, params, resid_BTD, 0, config.n_layers)
  return unembed(config, params, resid_BTD)


def make_cache(
  config: TransformerConfig, params: Params, n_sequences: int, n_positions: int
) -> Cache:
  """An empty cache for `n_positions`, of the parameters' type."""
  shape = (
    config.n_layers,
    n_sequences,
    n_positions,
    config.n_kv_heads,
    config.d_head,
  )
  dtype = params['embed'].dtype
  return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
