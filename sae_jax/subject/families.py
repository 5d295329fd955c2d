"""How model families name their hyper-parameters and tensors in GGUF files.

Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs.
"""

import dataclasses
from typing import Any

from sae_jax import config as config_lib
from sae_jax.subject import transformer


@dataclasses.dataclass(frozen=True)
class Family:
  """The names of one `general.architecture`.

  Attributes:
    rope_pairs: the rotary pairs its stored query and key rows are made for.
    whole: parameter -> tensor, of parameters that no block owns.
    blocks: parameter -> tensor of a block, after 'blk.N.'.
    optional: tensors that a file may leave out.
  """

  rope_pairs: str
  whole: dict[str, str]
  blocks: dict[str, str]
  optional: frozenset[str]


FAMILIES = {
  'llama': Family(
    # The converter permutes q and k from the half pairs they trained with.
    rope_pairs='interleaved',
    whole={
      'embed': 'token_embd.weight',
      'final_norm': 'output_norm.weight',
      'unembed': 'output.weight',
    },
    blocks={
      'attn_norm': 'attn_norm.weight',
      'query': 'attn_q.weight',
      'key': 'attn_k.weight',
      'value': 'attn_v.weight',
      'attn_out': 'attn_output.weight',
      'ffn_norm': 'ffn_norm.weight',
      'gate': 'ffn_gate.weight',
      'up': 'ffn_up.weight',
      'down': 'ffn_down.weight',
    },
    optional=frozenset({'output.weight'}),
  )
}


def find(metadata: dict[str, Any]) -> Family:
  """The family of a file by its `general.architecture`.

  Raises:
    UserError: if the architecture is not one of FAMILIES.
  """
  architecture = metadata.get('general.architecture')
  if architecture not in FAMILIES:
    raise config_lib.UserError(
      f'architecture {architecture!r} is not supported: '
      f'use a GGUF file of one of {", ".join(FAMILIES)}'
    )
  return FAMILIES[architecture]


def transformer_config(
  metadata: dict[str, Any], vocab_size: int
) -> transformer.TransformerConfig:
  """The transformer's shape from a file's metadata.

  Args:
    metadata: key -> value of the file.
    vocab_size: rows of the embedding (not every file records it).

  Raises:
    UserError: if a value is missing or asks for what `transformer` lacks:
      scaled or partial rotary positions.
  """
  family = find(metadata)
  prefix = metadata['general.architecture'] + '.'

  def value(name):
    if prefix + name not in metadata:
      raise config_lib.UserError(
        f'the GGUF file does not say {prefix + name}: convert the model again'
      )
    return metadata[prefix + name]

  d_model = value('embedding_length')
  n_heads = value('attention.head_count')
  d_head = metadata.get(prefix + 'attention.key_length', d_model // n_heads)
  rotary = metadata.get(prefix + 'rope.dimension_count', d_head)
  if rotary != d_head:
    raise config_lib.UserError(
      f'{rotary} of the {d_head} coordinates of a head rotate in this file: '
      'use a model in which all do'
    )
  scaling = metadata.get(prefix + 'rope.scaling.type', 'none')
  if scaling != 'none':
    raise config_lib.UserError(
      f'rotary scaling {scaling!r} is not supported: '
      'use a model whose positions are not scaled'
    )
  return transformer.TransformerConfig(
    n_layers=value('block_count'),
    d_model=d_model,
    n_heads=n_heads,
    n_kv_heads=metadata.get(prefix + 'attention.head_count_kv', n_heads),
    d_head=d_head,
    d_ff=value('feed_forward_length'),
    vocab_size=vocab_size,
    # GGUF's default where the file is silent.
    rope_base=metadata.get(prefix + 'rope.freq_base', 10000.0),
    norm_eps=value('attention.layer_norm_rms_epsilon'),
    rope_pairs=family.rope_pairs,
  )
