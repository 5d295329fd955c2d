"""The decoder-only transformer whose activations are read.

Pre-norm blocks of grouped-query attention with rotary positions and a SiLU
gated feed-forward, RMS norms, no biases (Llama; arXiv:2302.13971). Pure
functions of a static config and a nested dict of arrays. Axes beside the
package's key (there B counts tokens, here sequences):

  L  blocks                       G  key-value heads
  Q  query heads of one KV head   E  width of a head
  J  query heads x E              I  key-value heads x E
  F  feed-forward width           U  key positions
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import config as config_lib

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Shape of a transformer; hashable, so it can be a static jit argument.

  Attributes:
    n_layers: blocks.
    d_model: width of the residual stream.
    n_heads: query heads; consecutive ones share a key-value head.
    n_kv_heads: key-value heads, a divisor of n_heads.
    d_head: width of a head, even.
    d_ff: width of the gated feed-forward.
    vocab_size: tokens in the vocabulary.
    rope_base: base of the rotary wavelengths.
    norm_eps: added to the mean square in RMS norms.
    rope_pairs: which coordinates of a head rotate together: 'interleaved'
      pairs 2i with 2i + 1 (GGUF's Llama), 'half' pairs i with i + d_head / 2.
  """

  n_layers: int
  d_model: int
  n_heads: int
  n_kv_heads: int
  d_head: int
  d_ff: int
  vocab_size: int
  rope_base: float
  norm_eps: float
  rope_pairs: str

  def __post_init__(self):
    if self.n_heads % self.n_kv_heads:
      raise config_lib.UserError(
        f'n_heads {self.n_heads} must be a multiple of '
        f'n_kv_heads {self.n_kv_heads}'
      )
    if self.d_head % 2:
      raise config_lib.UserError(
        f'd_head {self.d_head} must be even: rotary positions turn pairs'
      )
    if self.rope_pairs not in ('interleaved', 'half'):
      raise config_lib.UserError(
        f'rope_pairs {self.rope_pairs!r} is not known: '
        'use one of interleaved, half'
      )


def param_shapes(config: TransformerConfig) -> dict[str, Any]:
  """Shapes of the parameters, nested as they are; blocks lead with L.

  A matrix is stored [inputs, outputs]. An optional `unembed` of the shape of
  `embed` belongs to a model whose embedding is not tied.
  """
  n, d, f = config.n_layers, config.d_model, config.d_ff
  j, i = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
  return {
    'embed': (config.vocab_size, d),
    'final_norm': (d,),
    'blocks': {
      'attn_norm': (n, d),
      'query': (n, d, j),
      'key': (n, d, i),
      'value': (n, d, i),
      'attn_out': (n, j, d),
      'ffn_norm': (n, d),
      'gate': (n, d, f),
      'up': (n, d, f),
      'down': (n, f, d),
    },
  }


def init(config: TransformerConfig, key: jax.Array) -> Params:
  """An untrained float32 model: the control for anything a model 'knows'.

  Matrices are normal with variance 1 / inputs, the embedding is standard
  normal, norms scale by one.
  """
  shapes, treedef = jax.tree.flatten_with_path(
    param_shapes(config), is_leaf=lambda x: isinstance(x, tuple)
  )
  leaves = []
  for (path, shape), leaf_key in zip(
    shapes, jax.random.split(key, len(shapes))
  ):
    name = path[-1].key
    if name.endswith('norm'):
      leaves.append(jnp.ones(shape))
    else:
      scale = 1.0 if name == 'embed' else 1 / math.sqrt(shape[-2])
      leaves.append(scale * jax.random.normal(leaf_key, shape))
  return jax.tree.unflatten(treedef, leaves)


def _rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
  wide_BTD = x_BTD.astype(jnp.float32)
  mean_square_BT1 = jnp.mean(jnp.square(wide_BTD), axis=-1, keepdims=True)
  unit_BTD = wide_BTD * jax.lax.rsqrt(mean_square_BT1 + eps)
  return unit_BTD.astype(x_BTD.dtype) * scale_D[None, None]


def _rotate(x: jax.Array, config: TransformerConfig) -> jax.Array:
  """Turns the pairs of the last axis by the position, the axis before it."""
  n_positions, width = x.shape[-2:]
  # Static, so numpy's float64 settles the angles before they are rounded.
  rate = config.rope_base ** (-np.arange(0, width, 2) / width)
  angle = np.arange(n_positions)[:, None] * rate[None]
  angle = angle.reshape((1,) * (x.ndim - 2) + angle.shape)
  cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
  if config.rope_pairs == 'interleaved':
    pair_axis, a, b = -1, x[..., 0::2], x[..., 1::2]
  else:
    pair_axis, (a, b) = -2, jnp.split(x, 2, axis=-1)
  turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=pair_axis)
  return turned.reshape(x.shape).astype(x.dtype)


def _attend_group(
  query_QTE: jax.Array, key_UE: jax.Array, value_UE: jax.Array
) -> jax.Array:
  """Causal attention of the query heads that share a key-value head."""
  scores_QTU = jnp.einsum(
    'QTE,UE->QTU', query_QTE, key_UE, preferred_element_type=jnp.float32
  )
  scores_QTU /= math.sqrt(query_QTE.shape[-1])
  past_TU = np.tri(*scores_QTU.shape[1:], dtype=bool)
  scores_QTU = jnp.where(past_TU[None], scores_QTU, -jnp.inf)
  weights_QTU = jax.nn.softmax(scores_QTU, axis=-1).astype(value_UE.dtype)
  return jnp.einsum('QTU,UE->QTE', weights_QTU, value_UE)


def _attend(
  query_BGQTE: jax.Array, key_BGTE: jax.Array, value_BGTE: jax.Array
) -> jax.Array:
  n_groups = math.prod(key_BGTE.shape[:2])
  groups = [
    x.reshape((n_groups, *x.shape[2:]))
    for x in (query_BGQTE, key_BGTE, value_BGTE)
  ]
  # On a CPU one group after the other stays in cache, which beat the batched
  # product end to end; accelerators need the whole batch at once.
  out = jax.lax.platform_dependent(
    *groups,
    cpu=lambda *g: jax.lax.map(lambda one: _attend_group(*one), g),
    default=jax.vmap(_attend_group),
  )
  return out.reshape(query_BGQTE.shape)


def _block(
  config: TransformerConfig, block: Params, resid_BTD: jax.Array
) -> jax.Array:
  n_sequences, n_positions, _ = resid_BTD.shape
  heads = (n_sequences, n_positions, config.n_kv_heads, -1, config.d_head)

  x_BTD = _rms_norm(resid_BTD, block['attn_norm'], config.norm_eps)
  query, key, value = (
    jnp.einsum('BTD,DJ->BTJ', x_BTD, block[name])
    .reshape(heads)
    .transpose(0, 2, 3, 1, 4)
    for name in ('query', 'key', 'value')
  )
  mixed_BGQTE = _attend(
    _rotate(query, config), _rotate(key[:, :, 0], config), value[:, :, 0]
  )
  mixed_BTJ = mixed_BGQTE.transpose(0, 3, 1, 2, 4).reshape(
    n_sequences, n_positions, -1
  )
  resid_BTD += jnp.einsum('BTJ,JD->BTD', mixed_BTJ, block['attn_out'])

  x_BTD = _rms_norm(resid_BTD, block['ffn_norm'], config.norm_eps)
  gate_BTF = jax.nn.silu(jnp.einsum('BTD,DF->BTF', x_BTD, block['gate']))
  up_BTF = jnp.einsum('BTD,DF->BTF', x_BTD, block['up'])
  return resid_BTD + jnp.einsum('BTF,FD->BTD', gate_BTF * up_BTF, block['down'])


def embed(params: Params, tokens_BT: jax.Array) -> jax.Array:
  """Token ids -> resid_BTD, the residual stream before block 0."""
  return params['embed'][tokens_BT]


def run_blocks(
  config: TransformerConfig,
  params: Params,
  resid_BTD: jax.Array,
  start: int,
  stop: int,
) -> jax.Array:
  """Applies blocks start..stop - 1 to the residual stream.

  Positions count from 0 in every sequence and attention is causal, so right
  padding changes nothing before it. Running a..b and then b..c gives what
  running a..c gives: on a CPU bit for bit, elsewhere as far as the compiler
  rounds a block alike in both.

  Args:
    config: the transformer's shape.
    params: its parameters.
    resid_BTD: the residual stream before block `start`.
    start: first block, 0-based.
    stop: one past the last block; `start` again returns the input.

  Returns:
    resid_BTD after block stop - 1.
  """

  def step(carry_BTD, index):
    block = jax.tree.map(
      functools.partial(
        jax.lax.dynamic_index_in_dim, index=index, keepdims=False
      ),
      params['blocks'],
    )
    return _block(config, block, carry_BTD), None

  # Scanning indices, not slices, spares a copy of blocks start..stop.
  resid_BTD, _ = jax.lax.scan(step, resid_BTD, jnp.arange(start, stop))
  return resid_BTD


def unembed(
  config: TransformerConfig, params: Params, resid_BTD: jax.Array
) -> jax.Array:
  """The last residual stream -> next-token logits_BTV, norm included."""
  x_BTD = _rms_norm(resid_BTD, params['final_norm'], config.norm_eps)
  unembed_VD = params.get('unembed', params['embed'])
  return jnp.einsum('BTD,VD->BTV', x_BTD, unembed_VD)


def forward(
  config: TransformerConfig, params: Params, tokens_BT: jax.Array
) -> jax.Array:
  """Token ids -> next-token logits_BTV.

  Args:
    config: the transformer's shape, static under jit.
    params: arrays shaped as `param_shapes(config)`.
    tokens_BT: int32 ids in [0, V); pad on the right with any id.
  """
  resid_BTD = embed(params, tokens_BT)
  resid_BTD = run_blocks(config, params, resid_BTD, 0, config.n_layers)
  return unembed(config, params, resid_BTD)
