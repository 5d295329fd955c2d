"""One block: norms, attention and feed-forward, with a tap at every site."""

from collections.abc import Callable
import functools
from typing import NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.subject import architecture, attention, positions

Params = architecture.Params
TransformerConfig = architecture.TransformerConfig

_ACTIVATIONS = {
  'silu': jax.nn.silu,
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
  'relu': jax.nn.relu,
}

# (name of a site, activations there) -> the activations to go on with.
Tap = Callable[[str, jax.Array], jax.Array]


class Cache(NamedTuple):
  """Keys and values of earlier positions, for every block.

  Attributes:
    key_LBUGE: keys, rotated.
    value_LBUGE: values.
  """

  key_LBUGE: jax.Array
  value_LBUGE: jax.Array


def norm(
  config: TransformerConfig, weights: Params, name: str, x: jax.Array
) -> jax.Array:
  """The norm of the last axis with the weights of this name."""
  wide = x.astype(jnp.float32)
  if config.norm == 'layer':
    wide -= wide.mean(-1, keepdims=True)
  mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
  wide *= jax.lax.rsqrt(mean_square + config.norm_eps)
  axes = tuple(range(x.ndim - 1))
  wide *= jnp.expand_dims(weights[name], axes)
  if f'{name}_bias' in weights:
    wide += jnp.expand_dims(weights[f'{name}_bias'], axes)
  return wide.astype(x.dtype)


def _linear(weights: Params, name: str, x_BTD: jax.Array) -> jax.Array:
  out_BTJ = jnp.einsum('BTD,DJ->BTJ', x_BTD, weights[name])
  if f'{name}_bias' in weights:
    out_BTJ += weights[f'{name}_bias'][None, None]
  return out_BTJ


def layers(config: TransformerConfig) -> dict[str, np.ndarray]:
  """Settings that differ from block to block, each [L]."""
  settings = {}
  if any(config.windows):
    # A block without a window: larger than any distance.
    whole = np.iinfo(np.int32).max
    settings['window'] = np.array(
      [w or whole for w in config.windows], np.int32
    )
    if config.local_rope_base:
      settings['rope'] = np.array([bool(w) for w in config.windows], np.int32)
  if config.attn_scale_by_block:
    divisor = np.arange(1, config.n_layers + 1, dtype=np.float32)
    settings['scale_divisor'] = divisor
  return settings


class Queries(NamedTuple):
  """Positions of the tokens of a pass, and of the keys they attend to.

  Attributes:
    position: of each token: T, or BT if sequences began at different times.
    n_keys: key positions, 0 to n_keys - 1.
    cos: of the rotary angles, [kinds, n_keys, H]; None for learned positions.
    sin: the same.
  """

  position: jax.Array | np.ndarray
  n_keys: int
  cos: np.ndarray | None
  sin: np.ndarray | None


@functools.cache
def _warn_of_length(n_positions: int, context_length: int) -> None:
  logging.warning(
    'contexts of %d positions are longer than the %d that the subject was made '
    'for: activations of the later ones are of no use',
    n_positions,
    context_length,
  )


def queries_of(
  config: TransformerConfig,
  n_positions: int,
  cache: Cache | None,
  first_B: jax.Array | None,
) -> Queries:
  """The queries of a pass over `n_positions` tokens of each sequence.

  Args:
    config: the transformer's shape.
    n_positions: T.
    cache: keys and values of earlier positions, or None.
    first_B: with a cache, the position of each sequence's first token.
  """
  n_keys = n_positions if cache is None else cache.key_LBUGE.shape[2]
  if 0 < config.context_length < n_keys:
    _warn_of_length(n_keys, config.context_length)
  cos, sin = (
    (None, None) if config.n_positions else positions.tables(config, n_keys)
  )
  position = np.arange(n_positions, dtype=np.int32)
  if cache is not None:
    position = first_B[:, None] + position[None]
  return Queries(position, n_keys, cos, sin)


def _seen(queries: Queries, layer: Params) -> jax.Array | np.ndarray:
  """Which keys each query attends to: TU, or BTU."""
  position = queries.position
  keys = np.arange(queries.n_keys, dtype=np.int32)
  distance = position[..., None] - keys.reshape((1,) * position.ndim + (-1,))
  seen = distance >= 0
  return seen & (distance < layer['window']) if 'window' in layer else seen


def _angles(queries: Queries, layer: Params) -> tuple[jax.Array, jax.Array]:
  """cos and sin of the queries' angles, [1 or B, 1, 1, T, H]."""

  def of_queries(table):
    table = jnp.asarray(table)[layer.get('rope', 0)]
    if queries.position.ndim == 2:
      return table[queries.position][:, None, None]
    return table[None, None, None]

  return of_queries(queries.cos), of_queries(queries.sin)


def _attention(
  config: TransformerConfig,
  weights: Params,
  layer: Params,
  queries: Queries,
  x_BTD: jax.Array,
  tap: Tap,
  index: jax.Array,
  cache: Cache | None,
) -> tuple[jax.Array, Cache | None]:
  n_sequences, n_positions, _ = x_BTD.shape
  by_head = (n_sequences, n_positions, config.n_kv_heads, -1, config.d_head)
  query, key, value = (
    tap(site, _linear(weights, name, x_BTD)).reshape(by_head)
    for site, name in (('q', 'query'), ('k', 'key'), ('v', 'value'))
  )
  if config.qk_norm:
    # One weight of width E, of the same kind of norm as the others.
    query = norm(config, weights, 'query_norm', query)
    key = norm(config, weights, 'key_norm', key)
  query, key, value = (x.transpose(0, 2, 3, 1, 4) for x in (query, key, value))
  if not config.n_positions:
    cos, sin = _angles(queries, layer)
    query = positions.rotate(query, cos, sin, config.rope_pairs)
    key = positions.rotate(key, cos, sin, config.rope_pairs)
  key_BGUE, value_BGUE = key[:, :, 0], value[:, :, 0]
  if cache is not None:
    cache = _cached(cache, index, queries.position, key_BGUE, value_BGUE)
    key_BGUE, value_BGUE = (
      jax.lax.dynamic_index_in_dim(x, index, keepdims=False).transpose(
        0, 2, 1, 3
      )
      for x in cache
    )
  scale = config.attn_scale or config.d_head**-0.5
  if 'scale_divisor' in layer:
    scale = scale / layer['scale_divisor']
  mixed_BGQTE = attention.attend(
    query,
    key_BGUE,
    value_BGUE,
    jnp.asarray(_seen(queries, layer)),
    scale,
    config.attn_softcap,
  )
  mixed_BTJ = mixed_BGQTE.transpose(0, 3, 1, 2, 4).reshape(
    n_sequences, n_positions, -1
  )
  out_BTD = _linear(weights, 'attn_out', tap('z', mixed_BTJ))
  out_BTD = tap('attn_raw', out_BTD)
  if config.post_norms:
    out_BTD = norm(config, weights, 'attn_post_norm', out_BTD)
  return tap('attn_out', out_BTD), cache


def _cached(
  cache: Cache,
  index: jax.Array,
  position_BT: jax.Array,
  key_BGTE: jax.Array,
  value_BGTE: jax.Array,
) -> Cache:
  """The cache with a block's keys and values at these positions."""
  row_B1 = jnp.arange(len(position_BT))[:, None]
  return Cache(
    *(
      # Positions beyond the cache would be clamped onto the last one.
      old.at[index, row_B1, position_BT].set(
        new_BGTE.transpose(0, 2, 1, 3).astype(old.dtype), mode='drop'
      )
      for old, new_BGTE in zip(cache, (key_BGTE, value_BGTE))
    )
  )


def _feed_forward(
  config: TransformerConfig, weights: Params, x_BTD: jax.Array, tap: Tap
) -> jax.Array:
  activation = _ACTIVATIONS[config.activation]
  up_BTF = _linear(weights, 'up', x_BTD)
  if config.gated:
    hidden_BTF = activation(_linear(weights, 'gate', x_BTD)) * up_BTF
  else:
    hidden_BTF = activation(up_BTF)
  out_BTD = _linear(weights, 'down', tap('mlp_act', hidden_BTF))
  out_BTD = tap('mlp_raw', out_BTD)
  if config.post_norms:
    out_BTD = norm(config, weights, 'ffn_post_norm', out_BTD)
  return tap('mlp_out', out_BTD)


def apply(
  config: TransformerConfig,
  weights: Params,
  layer: Params,
  queries: Queries,
  resid_BTD: jax.Array,
  tap: Tap,
  index: jax.Array,
  cache: Cache | None,
) -> tuple[jax.Array, Cache | None]:
  """One block.

  Args:
    config: the transformer's shape.
    weights: the block's parameters.
    layer: the block's settings, of `layers`.
    queries: the tokens' positions.
    resid_BTD: the residual stream before the block.
    tap: called at every site in turn.
    index: number of the block, which finds its entries in the cache.
    cache: cache of all blocks, or None.

  Returns:
    The residual stream after it, and the cache with the new positions.
  """
  resid_BTD = tap('resid_pre', resid_BTD)
  x_BTD = tap('attn_in', norm(config, weights, 'attn_norm', resid_BTD))
  attn_BTD, cache = _attention(
    config, weights, layer, queries, x_BTD, tap, index, cache
  )
  if config.parallel:
    x_BTD = resid_BTD
  else:
    resid_BTD = x_BTD = tap('resid_mid', resid_BTD + attn_BTD)
  x_BTD = tap('mlp_in', norm(config, weights, 'ffn_norm', x_BTD))
  mlp_BTD = _feed_forward(config, weights, x_BTD, tap)
  if config.parallel:
    resid_BTD += attn_BTD
  return tap('resid_post', resid_BTD + mlp_BTD), cache
