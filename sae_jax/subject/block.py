"""One block: norms, attention and feed-forward, with a tap at every site."""

from collections.abc import Callable
import functools
from typing import NamedTuple

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

# Called with the name of a site and what is there; returns what goes on.
Tap = Callable[[str, jax.Array], jax.Array]


class Cache(NamedTuple):
  """Keys and values of the positions seen, for every block.

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
  """What differs from block to block beside the parameters, each [L]."""
  found = {}
  if any(config.windows):
    # Beyond any distance, for a block that sees everything.
    whole = np.iinfo(np.int32).max
    found['window'] = np.array([w or whole for w in config.windows], np.int32)
    if config.local_rope_base:
      found['rope'] = np.array([bool(w) for w in config.windows], np.int32)
  if config.attn_scale_by_block:
    divisor = np.arange(1, config.n_layers + 1, dtype=np.float32)
    found['scale_divisor'] = divisor
  return found


class Place(NamedTuple):
  """Where the tokens of a pass stand: query positions, angles, the cache."""

  query: jax.Array | np.ndarray  # T, or BT of sequences that began apart
  n_keys: int
  cos: np.ndarray | None
  sin: np.ndarray | None


def place_of(
  config: TransformerConfig,
  n_positions: int,
  cache: Cache | None,
  first_B: jax.Array | None,
) -> Place:
  n_keys = n_positions if cache is None else cache.key_LBUGE.shape[2]
  # None turns where positions are learned.
  cos, sin = (
    (None, None) if config.n_positions else positions.tables(config, n_keys)
  )
  query = np.arange(n_positions, dtype=np.int32)
  if cache is not None:
    query = first_B[:, None] + query[None]
  return Place(query, n_keys, cos, sin)


def _seen(place: Place, layer: Params) -> jax.Array | np.ndarray:
  """Which keys a query sees: TU, or BTU."""
  keys = np.arange(place.n_keys, dtype=np.int32)
  distance = place.query[..., None] - keys.reshape(
    (1,) * place.query.ndim + (-1,)
  )
  seen = distance >= 0
  return seen & (distance < layer['window']) if 'window' in layer else seen


def _angles(
  config: TransformerConfig, place: Place, layer: Params
) -> tuple[jax.Array, jax.Array]:
  """cos and sin, [1, 1, 1, T, H], or with B in front."""
  found = []
  for table in (place.cos, place.sin):
    table = jnp.asarray(table)[layer.get('rope', 0)]
    if place.query.ndim == 2:
      found.append(table[place.query][:, None, None])
    else:
      found.append(table[None, None, None])
  return tuple(found)


def _attention(
  config: TransformerConfig,
  weights: Params,
  layer: Params,
  place: Place,
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
    cos, sin = _angles(config, place, layer)
    query = positions.rotate(query, cos, sin, config.rope_pairs)
    key = positions.rotate(key, cos, sin, config.rope_pairs)
  key_BGUE, value_BGUE = key[:, :, 0], value[:, :, 0]
  if cache is not None:
    row_B1 = jnp.arange(n_sequences)[:, None]
    cache = Cache(
      *(
        # Positions beyond the cache would be clamped onto the last one.
        old.at[index, row_B1, place.query].set(
          new_BGTE.transpose(0, 2, 1, 3).astype(old.dtype), mode='drop'
        )
        for old, new_BGTE in zip(cache, (key_BGUE, value_BGUE))
      )
    )
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
    jnp.asarray(_seen(place, layer)),
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
  place: Place,
  resid_BTD: jax.Array,
  tap: Tap,
  index: jax.Array,
  cache: Cache | None,
) -> tuple[jax.Array, Cache | None]:
  """One block.

  Args:
    config: the transformer's shape.
    weights: the block's parameters.
    layer: the block's part of `layers`.
    place: where the tokens stand.
    resid_BTD: the residual stream before the block.
    tap: called at every site in turn.
    index: number of the block, of its part of the cache.
    cache: of all blocks, or None.

  Returns:
    The residual stream after it, and the cache with the new positions.
  """
  resid_BTD = tap('resid_pre', resid_BTD)
  x_BTD = tap('attn_in', norm(config, weights, 'attn_norm', resid_BTD))
  attn_BTD, cache = _attention(
    config, weights, layer, place, x_BTD, tap, index, cache
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
