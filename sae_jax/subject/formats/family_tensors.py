"""Names of the tensors in the safetensors files of each family.

The names lack the prefix of the model's class, which `folder` removes.
"""

from sae_jax.subject import transformer
from sae_jax.subject.formats import assembly

Source = assembly.Source


def _modules(config, names, kinds) -> dict[str, Source]:
  """Sources of the parameters that are weights and biases of modules.

  Args:
    config: the transformer's shape.
    names: parameter -> module; a block's parameter has the prefix 'blocks.'.
    kinds: parameter -> how to read its weight, where not as usual: a matrix is
      turned, and others are read as they are.
  """
  sources = {}
  shapes = transformer.param_shapes(config)
  for name, shape in (
    shapes | {f'blocks.{k}': v for k, v in shapes['blocks'].items()}
  ).items():
    module = names.get(name.removesuffix('_bias'))
    if name == 'blocks' or module is None:
      continue
    if name.endswith('_bias'):
      sources[name] = Source(f'{module}.bias')
    else:
      matrix = len(shape) == 3
      kind = kinds.get(name, assembly.turned if matrix else assembly.as_is)
      sources[name] = Source(f'{module}.weight', kind)
  return sources


def llama(config: transformer.TransformerConfig) -> dict[str, Source]:
  """Sources of Llama, Mistral and Qwen; with other norms of Gemma 2 and 3."""
  names = {
    'embed': 'embed_tokens',
    'final_norm': 'norm',
    'unembed': 'lm_head',
    'blocks.attn_norm': 'layers.{}.input_layernorm',
    'blocks.query': 'layers.{}.self_attn.q_proj',
    'blocks.key': 'layers.{}.self_attn.k_proj',
    'blocks.value': 'layers.{}.self_attn.v_proj',
    'blocks.query_norm': 'layers.{}.self_attn.q_norm',
    'blocks.key_norm': 'layers.{}.self_attn.k_norm',
    'blocks.attn_out': 'layers.{}.self_attn.o_proj',
    'blocks.ffn_norm': 'layers.{}.post_attention_layernorm',
    'blocks.gate': 'layers.{}.mlp.gate_proj',
    'blocks.up': 'layers.{}.mlp.up_proj',
    'blocks.down': 'layers.{}.mlp.down_proj',
  }
  if config.post_norms:
    names |= {
      'blocks.attn_post_norm': 'layers.{}.post_attention_layernorm',
      'blocks.ffn_norm': 'layers.{}.pre_feedforward_layernorm',
      'blocks.ffn_post_norm': 'layers.{}.post_feedforward_layernorm',
    }
  return _modules(config, names, {})


def gemma(config: transformer.TransformerConfig) -> dict[str, Source]:
  """Sources of Gemma, whose norms are stored less one."""
  return {
    name: Source(source.tensor, assembly.plus_one)
    if name.endswith('norm')
    else source
    for name, source in llama(config).items()
  }


def neox(config: transformer.TransformerConfig) -> dict[str, Source]:
  """Sources of GPT-NeoX, whose queries, keys and values are head by head."""
  names = {
    'embed': 'embed_in',
    'final_norm': 'final_layer_norm',
    'unembed': 'embed_out',
    'blocks.attn_norm': 'layers.{}.input_layernorm',
    'blocks.attn_out': 'layers.{}.attention.dense',
    'blocks.ffn_norm': 'layers.{}.post_attention_layernorm',
    'blocks.up': 'layers.{}.mlp.dense_h_to_4h',
    'blocks.down': 'layers.{}.mlp.dense_4h_to_h',
  }
  sources = _modules(config, names, {})
  fused = 'layers.{}.attention.query_key_value'
  for index, name in enumerate(('query', 'key', 'value')):
    sources[f'blocks.{name}'] = Source(
      f'{fused}.weight', assembly.head_third(index, config.n_heads, turn=True)
    )
    if config.qkv_bias:
      sources[f'blocks.{name}_bias'] = Source(
        f'{fused}.bias', assembly.head_third(index, config.n_heads)
      )
  return sources


def gpt2(config: transformer.TransformerConfig) -> dict[str, Source]:
  """Sources of GPT-2, which has all queries, keys and values in one tensor."""
  names = {
    'embed': 'wte',
    'positions': 'wpe',
    'final_norm': 'ln_f',
    'unembed': 'lm_head',
    'blocks.attn_norm': 'h.{}.ln_1',
    'blocks.attn_out': 'h.{}.attn.c_proj',
    'blocks.ffn_norm': 'h.{}.ln_2',
    'blocks.up': 'h.{}.mlp.c_fc',
    'blocks.down': 'h.{}.mlp.c_proj',
  }
  # Stored [inputs, outputs] already.
  kinds = {
    f'blocks.{name}': assembly.as_is for name in ('attn_out', 'up', 'down')
  }
  sources = _modules(config, names, kinds)
  for index, name in enumerate(('query', 'key', 'value')):
    for parameter, tensor in ((name, 'weight'), (f'{name}_bias', 'bias')):
      sources[f'blocks.{parameter}'] = Source(
        'h.{}.attn.c_attn.' + tensor, assembly.third(index)
      )
  return sources
