"""How a subject's arrays are sharded over a mesh ("data", "latent").

Sequences are sharded over `data`. Heads, the feed-forward's hidden units and
the vocabulary are sharded over `latent` (Megatron-LM, arXiv:1909.08053), so
each block sums over `latent` after attention and after the feed-forward.
"""

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sae_jax.subject import transformer

_AXIS = 'latent'
# Parameter -> the axis over `latent`, counted from the end.
_SHARDED_AXIS = {
  'embed': -2,
  'unembed': -2,
  'query': -1,
  'query_bias': -1,
  'key': -1,
  'key_bias': -1,
  'value': -1,
  'value_bias': -1,
  'attn_out': -2,
  'gate': -1,
  'gate_bias': -1,
  'up': -1,
  'up_bias': -1,
  'down': -2,
}


def param_shardings(
  config: transformer.TransformerConfig, mesh: jax.sharding.Mesh
) -> transformer.Params:
  """The sharding of every parameter, nested as they are.

  An axis that `latent` does not divide, counted in whole key-value heads where
  there are heads, is not sharded: the parameter is whole on every device.
  """
  size = mesh.shape[_AXIS]
  # Number of units that must not be cut: heads, or single rows elsewhere.
  units = dict.fromkeys(('embed', 'unembed'), config.vocab_size)
  units |= dict.fromkeys(('query', 'attn_out'), config.n_kv_heads)
  units |= dict.fromkeys(('key', 'value'), config.n_kv_heads)
  units |= dict.fromkeys(('gate', 'up', 'down'), config.d_ff)

  def spec(path, shape):
    name = path[-1].key
    axes = [None] * len(shape)
    if name in _SHARDED_AXIS and units[name.removesuffix('_bias')] % size == 0:
      axes[_SHARDED_AXIS[name]] = _AXIS
    return NamedSharding(mesh, PartitionSpec(*axes))

  return jax.tree_util.tree_map_with_path(
    spec,
    transformer.param_shapes(config),
    is_leaf=lambda x: isinstance(x, tuple),
  )


def place(
  config: transformer.TransformerConfig,
  params: transformer.Params,
  mesh: jax.sharding.Mesh,
) -> transformer.Params:
  """A subject's parameters over a mesh; every process has all of them."""
  return jax.device_put(params, param_shardings(config, mesh))


def tokens_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The sharding of tokens_BT: sequences over `data`."""
  return NamedSharding(mesh, PartitionSpec('data'))
