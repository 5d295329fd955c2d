"""The shape of a decoder-only transformer: its switches and its parameters.

Axes beside the package's key (there B counts tokens, here sequences):

  L  blocks                       G  key-value heads
  Q  query heads of one KV head   E  width of a head
  J  query heads x E              I  key-value heads x E
  F  feed-forward width           U  key positions
  P  learned positions            H  rotary pairs of a head
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax import errors

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary wavelengths were stretched after training.

  Attributes:
    kind: 'linear' divides every frequency by `factor`; 'llama3' does so for
      long wavelengths, not for short ones, and blends between (Llama 3.1);
      'factors' divides pair i by `factors[i]` (GGUF's form of 'llama3').
    factor: the divisor.
    low_freq_factor: wavelengths above original_length / this are long.
    high_freq_factor: wavelengths below original_length / this are short.
    original_length: positions the model was first trained for.
    factors: a divisor for each rotary pair.
  """

  kind: str
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_length: int = 8192
  factors: tuple[float, ...] = ()

  def __post_init__(self):
    _check_one_of('rope scaling', self.kind, ('linear', 'llama3', 'factors'))


_SIZES = (
  'n_layers', 'd_model', 'n_heads', 'n_kv_heads', 'd_head', 'd_ff',
  'vocab_size',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Shape of a transformer; hashable, so it can be a static jit argument.

  The defaults of the fields after `rope_pairs` are Llama's.

  Attributes:
    n_layers: blocks.
    d_model: width of the residual stream.
    n_heads: query heads; consecutive ones share a key-value head.
    n_kv_heads: key-value heads, a divisor of n_heads.
    d_head: width of a head, even.
    d_ff: width of the feed-forward.
    vocab_size: rows of the embedding.
    rope_base: base of the rotary wavelengths.
    norm_eps: added to the mean square, or the variance, in norms.
    rope_pairs: which coordinates of a head rotate together: 'interleaved'
      pairs 2i with 2i + 1 (GGUF's Llama), 'half' pairs i with i + H.
    rotary_dim: leading coordinates of a head that rotate; 0 for all.
    rope_scaling: stretching of the wavelengths, None for none.
    local_rope_base: base of the wavelengths in blocks with a window, where they
      are never stretched (Gemma 3); 0 for the same as in the other blocks.
    n_positions: rows of a table of learned positions (GPT-2); 0 for rotary
      positions.
    context_length: positions that the model was made for; 0 if not known.
    norm: 'rms' scales, 'layer' centres, scales and adds a bias.
    post_norms: whether the outputs of attention and feed-forward are normed
      before they are added to the residual stream (Gemma 2 and 3).
    parallel: whether the feed-forward reads the residual stream before
      attention was added to it (GPT-NeoX).
    qk_norm: whether queries and keys are normed head by head before they
      rotate (Qwen3, Gemma 3).
    qkv_bias: whether queries, keys and values have a bias.
    attn_out_bias: whether attention's output has a bias.
    ffn_bias: whether the feed-forward's matrices have biases.
    gated: whether the feed-forward is act(gate) x up, instead of act(up).
    activation: 'silu', 'gelu' (by erf), 'gelu_tanh' or 'relu'.
    windows: for each block how many positions a token attends to, its own
      included; 0 for all up to its own. Empty if no block has a window.
    attn_scale: multiplies query-key products; 0 for d_head ** -0.5.
    attn_scale_by_block: whether block i divides the products by i + 1.
    attn_softcap: c of c tanh(score / c); 0 for none (Gemma 2).
    final_softcap: the same for the logits.
    embed_scale: multiplies embedded tokens (Gemma).
    tied: whether the embedding is also the unembedding.
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
  rotary_dim: int = 0
  rope_scaling: RopeScaling | None = None
  local_rope_base: float = 0.0
  n_positions: int = 0
  context_length: int = 0
  norm: str = 'rms'
  post_norms: bool = False
  parallel: bool = False
  qk_norm: bool = False
  qkv_bias: bool = False
  attn_out_bias: bool = False
  ffn_bias: bool = False
  gated: bool = True
  activation: str = 'silu'
  windows: tuple[int, ...] = ()
  attn_scale: float = 0.0
  attn_scale_by_block: bool = False
  attn_softcap: float = 0.0
  final_softcap: float = 0.0
  embed_scale: float = 1.0
  tied: bool = True

  def __post_init__(self):
    for name in _SIZES:
      if not 1 <= getattr(self, name) < 2**31:
        raise errors.UserError(
          f'{name} {getattr(self, name)} must be from 1 to {2**31 - 1}'
        )
    if self.n_heads % self.n_kv_heads:
      raise errors.UserError(
        f'n_heads {self.n_heads} must be a multiple of '
        f'n_kv_heads {self.n_kv_heads}'
      )
    if self.d_head % 2:
      raise errors.UserError(
        f'd_head {self.d_head} must be even: rotary positions turn pairs'
      )
    if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.d_head:
      raise errors.UserError(
        f'rotary_dim {self.rotary_dim} must be even and at most '
        f'd_head {self.d_head}'
      )
    if self.windows and len(self.windows) != self.n_layers:
      raise errors.UserError(
        f'windows has {len(self.windows)} entries for {self.n_layers} blocks: '
        'give one each, 0 for a block without'
      )
    _check_one_of('rope_pairs', self.rope_pairs, ('interleaved', 'half'))
    _check_one_of('norm', self.norm, ('rms', 'layer'))
    _check_one_of(
      'activation', self.activation, ('silu', 'gelu', 'gelu_tanh', 'relu')
    )


def _check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
  if value not in known:
    raise errors.UserError(
      f'{name} {value!r} is not known: use one of {", ".join(known)}'
    )


def param_shapes(config: TransformerConfig) -> dict[str, Any]:
  """Shapes of the parameters, nested as they are; blocks lead with L.

  A matrix is stored [inputs, outputs]. A norm's weight is the factor itself
  (Gemma's files hold the factor less one). `unembed`, of the shape of `embed`,
  exists unless the embedding is tied.
  """
  n, d, f = config.n_layers, config.d_model, config.d_ff
  j, i = config.n_heads * config.d_head, config.n_kv_heads * config.d_head

  def norm(name, *shape):
    weight = {name: shape}
    return weight | ({f'{name}_bias': shape} if config.norm == 'layer' else {})

  def biases(has_bias, **shapes):
    return {f'{k}_bias': v for k, v in shapes.items()} if has_bias else {}

  blocks = norm('attn_norm', n, d)
  blocks |= {'query': (n, d, j), 'key': (n, d, i), 'value': (n, d, i)}
  blocks |= biases(config.qkv_bias, query=(n, j), key=(n, i), value=(n, i))
  if config.qk_norm:
    blocks |= {name: (n, config.d_head) for name in ('query_norm', 'key_norm')}
  blocks |= {'attn_out': (n, j, d)}
  blocks |= biases(config.attn_out_bias, attn_out=(n, d))
  blocks |= norm('ffn_norm', n, d)
  if config.gated:
    blocks |= {'gate': (n, d, f)} | biases(config.ffn_bias, gate=(n, f))
  blocks |= {'up': (n, d, f), 'down': (n, f, d)}
  blocks |= biases(config.ffn_bias, up=(n, f), down=(n, d))
  if config.post_norms:
    blocks |= norm('attn_post_norm', n, d) | norm('ffn_post_norm', n, d)
  whole = {'embed': (config.vocab_size, d)} | norm('final_norm', d)
  if config.n_positions:
    whole['positions'] = (config.n_positions, d)
  if not config.tied:
    whole['unembed'] = (config.vocab_size, d)
  return whole | {'blocks': blocks}


def init(config: TransformerConfig, key: jax.Array) -> Params:
  """An untrained float32 model, a control for what a trained one 'knows'.

  Matrices are normal with variance 1 / inputs, the embedding is standard
  normal, norms scale by one, biases are zero.
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
    elif name.endswith('bias'):
      leaves.append(jnp.zeros(shape))
    else:
      inputs = shape[-1] if name == 'unembed' else shape[-2]
      scale = 1.0 if name == 'embed' else 1 / math.sqrt(inputs)
      leaves.append(scale * jax.random.normal(leaf_key, shape))
  return jax.tree.unflatten(treedef, leaves)
