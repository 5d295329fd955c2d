"""Where a subject's arrays lie on a mesh ("data", "latent").

Sequences are split over `data`. Over `latent` go heads, the feed-forward's
hidden units and the vocabulary (Megatron-LM, arXiv:1909.08053), so each block
has one sum over the axis after attention and one after the feed-forward.
"""

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sae_jax.subject import transformer

_AXIS = 'latent'
# Parameter -> axis that is split, counted from the end.
_SPLIT = {
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

  What the axis does not divide, whole heads of keys and values among it, lies
  whole on each device.
  """
  size = mesh.shape[_AXIS]
  # Units that must not be cut: heads, and rows elsewhere.
  units = dict.fromkeys(('embed', 'unembed'), config.vocab_size)
  units |= dict.fromkeys(('query', 'attn_out'), config.n_kv_heads)
  units |= dict.fromkeys(('key', 'value'), config.n_kv_heads)
  units |= dict.fromkeys(('gate', 'up', 'down'), config.d_ff)

  def spec(path, shape):
    name = path[-1].key
    axes = [None] * len(shape)
    if name in _SPLIT and units[name.removesuffix('_bias')] % size == 0:
      axes[_SPLIT[name]] = _AXIS
    return NamedSharding(mesh, PartitionSpec(*axes))

  return jax.tree_util.tree_map_with_path(
    spec,
    transformer.param_shapes(config),
    is_leaf=lambda x: isinstance(x, tuple),
  )


def tokens_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Of tokens_BT: sequences over `data`."""
  return NamedSharding(mesh, PartitionSpec('data'))
