"""The models of `hf_folder` as GGUF's converter writes them."""

import math
import pathlib

import gguf
import numpy as np
from tokenizers import pre_tokenizers

from tests.support import hf_folder

_ARCHITECTURES = {
  'gpt2': 'gpt2',
  'gpt_neox': 'gptneox',
  'llama': 'llama',
  'qwen2': 'qwen2',
  'qwen3': 'qwen3',
  'gemma2': 'gemma2',
  'gemma3_text': 'gemma3',
}
_NAMES = {
  'embed_tokens': 'token_embd',
  'embed_in': 'token_embd',
  'wte': 'token_embd',
  'wpe': 'position_embd',
  'norm': 'output_norm',
  'final_layer_norm': 'output_norm',
  'ln_f': 'output_norm',
  'lm_head': 'output',
  'embed_out': 'output',
  'input_layernorm': 'attn_norm',
  'ln_1': 'attn_norm',
  'self_attn.q_proj': 'attn_q',
  'self_attn.k_proj': 'attn_k',
  'self_attn.v_proj': 'attn_v',
  'self_attn.o_proj': 'attn_output',
  'self_attn.q_norm': 'attn_q_norm',
  'self_attn.k_norm': 'attn_k_norm',
  'attn.c_attn': 'attn_qkv',
  'attn.c_proj': 'attn_output',
  'attention.query_key_value': 'attn_qkv',
  'attention.dense': 'attn_output',
  'post_attention_layernorm': 'ffn_norm',
  'ln_2': 'ffn_norm',
  'pre_feedforward_layernorm': 'ffn_norm',
  'post_feedforward_layernorm': 'post_ffw_norm',
  'mlp.gate_proj': 'ffn_gate',
  'mlp.up_proj': 'ffn_up',
  'mlp.down_proj': 'ffn_down',
  'mlp.c_fc': 'ffn_up',
  'mlp.c_proj': 'ffn_down',
  'mlp.dense_h_to_4h': 'ffn_up',
  'mlp.dense_4h_to_h': 'ffn_down',
}


def _renamed(name, architecture):
  module, _, suffix = name.rpartition('.')
  parts = module.split('.')
  blocks = [i for i, part in enumerate(parts) if part.isdigit()]
  if not blocks:
    return f'{_NAMES[parts[-1]]}.{suffix}'
  inner = '.'.join(parts[blocks[0] + 1 :])
  new = _NAMES[inner]
  if architecture in ('gemma2', 'gemma3') and inner.startswith('post_att'):
    new = 'post_attention_norm'
  return f'blk.{parts[blocks[0]]}.{new}.{suffix}'


def tensors(record):
  """Tensors by their GGUF names, as the converter changes them."""
  config = record['config']
  architecture = _ARCHITECTURES[config['model_type']]
  n_heads = config.get('num_attention_heads', config.get('n_head'))
  renamed = {}
  for name, values in hf_folder.tensors(record).items():
    new = _renamed(name, architecture)
    if architecture == 'llama' and ('attn_q.' in new or 'attn_k.' in new):
      heads = n_heads if 'attn_q' in new else config['num_key_value_heads']
      halves = values.reshape(heads, 2, -1, *values.shape[1:])
      values = halves.swapaxes(1, 2).reshape(values.shape)
    if architecture == 'gpt2' and values.ndim == 2 and new.startswith('blk'):
      values = values.T
    if architecture == 'gptneox' and 'qkv' in new:
      heads = values.reshape(n_heads, 3, -1, *values.shape[1:])
      values = heads.swapaxes(0, 1).reshape(values.shape)
    if architecture.startswith('gemma') and new.endswith('norm.weight'):
      values = values + 1
    renamed[new] = np.ascontiguousarray(values)
  rope = config.get('rope_parameters') or {}
  if rope.get('rope_type') == 'llama3':
    renamed['rope_freqs.weight'] = _factors(rope, config)
  return renamed


def _factors(rope, config):
  width = config['hidden_size'] // config['num_attention_heads']
  low = rope['original_max_position_embeddings'] / rope['low_freq_factor']
  high = rope['original_max_position_embeddings'] / rope['high_freq_factor']
  factors = []
  for i in range(0, width, 2):
    length = 2 * math.pi * rope['rope_theta'] ** (i / width)
    if length < high:
      factors.append(1.0)
    elif length > low:
      factors.append(rope['factor'])
    else:
      smooth = rope['original_max_position_embeddings'] / length
      smooth -= rope['low_freq_factor']
      smooth /= rope['high_freq_factor'] - rope['low_freq_factor']
      factors.append(1 / ((1 - smooth) / rope['factor'] + smooth))
  return np.array(factors, np.float32)


_OF_GEMMA = {
  'sliding_window': 'attention.sliding_window',
  'attn_logit_softcapping': 'attn_logit_softcapping',
  'final_logit_softcapping': 'final_logit_softcapping',
}


def metadata(record):
  """Key -> value, without the architecture's prefix."""
  config = record['config']
  kind = config['model_type']
  if kind == 'gpt2':
    return {
      'block_count': config['n_layer'],
      'embedding_length': config['n_embd'],
      'feed_forward_length': 4 * config['n_embd'],
      'context_length': config['n_positions'],
      'attention.head_count': config['n_head'],
      'attention.layer_norm_epsilon': config['layer_norm_epsilon'],
    }
  rope = config['rope_parameters']
  rope = rope.get('full_attention', rope)
  d_head = config['hidden_size'] // config['num_attention_heads']
  values = {
    'block_count': config['num_hidden_layers'],
    'embedding_length': config['hidden_size'],
    'feed_forward_length': config['intermediate_size'],
    'context_length': config['max_position_embeddings'],
    'attention.head_count': config['num_attention_heads'],
    'rope.freq_base': float(rope['rope_theta']),
  }
  if rope.get('rope_type') == 'linear':
    values['rope.scaling.type'] = 'linear'
    values['rope.scaling.factor'] = float(rope['factor'])
  if kind == 'gpt_neox':
    return values | {
      'rope.dimension_count': int(d_head * rope['partial_rotary_factor']),
      'use_parallel_residual': config['use_parallel_residual'],
      'attention.layer_norm_epsilon': config['layer_norm_eps'],
    }
  values |= {
    'attention.head_count_kv': config['num_key_value_heads'],
    'attention.layer_norm_rms_epsilon': config['rms_norm_eps'],
    'attention.key_length': config.get('head_dim', d_head),
    'attention.value_length': config.get('head_dim', d_head),
  }
  if kind.startswith('gemma'):
    for name, key in _OF_GEMMA.items():
      # What is off has no null here.
      if name in config:
        values[key] = config[name] or 0
  return values


def write(path, record, *, more=None, split=0, bos=False):
  """Writes a whole GGUF file with a small tokenizer; returns its path.

  Args:
    path: the file.
    record: a model of `hf_folder.golden`.
    more: metadata to add or replace, without the architecture's prefix; None
      removes a key.
    split: tensors of a part, if it is written in parts; the path of the first
      is returned.
    bos: whether contexts begin with <s>, token 257.
  """
  architecture = _ARCHITECTURES[record['config']['model_type']]
  writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
  adders = {
    bool: writer.add_bool,
    int: writer.add_uint32,
    float: writer.add_float32,
    str: writer.add_string,
    list: writer.add_array,
  }
  values = metadata(record) | {'vocab_size': record['config']['vocab_size']}
  for key, value in (values | (more or {})).items():
    if value is not None:
      adders[type(value)](f'{architecture}.{key}', value)
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre('gpt-2')
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  n_tokens = record['config']['vocab_size']
  tokens = ['ab', *letters, '<s>'][:n_tokens]
  writer.add_token_list(tokens)
  writer.add_token_types([3 if token == '<s>' else 1 for token in tokens])
  if bos:
    writer.add_bos_token_id(257)
    writer.add_add_bos_token(True)
  # Empty lists are not written.
  writer.add_token_merges(['a b'])
  for name, array in tensors(record).items():
    writer.add_tensor(name, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  if split:
    path = min(pathlib.Path(path).parent.glob(f'{path.stem}-*.gguf'))
  return str(path)


def of_bytes(name='llama 3 stretched positions', many=257):
  """A model of `hf_folder.golden` with tokens for all bytes."""
  record = hf_folder.golden()[name]
  few = record['config']['vocab_size']
  return record | {
    'config': record['config'] | {'vocab_size': many},
    'tensors': {
      name: [many if size == few else size for size in shape]
      for name, shape in record['tensors'].items()
    },
  }
