"""A harvest of a toy: a random model of bytes, and texts for it."""

import functools
import json

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from sae_jax import subject as subject_lib
from sae_jax.harvesting import harvest
from sae_jax.harvesting.config import HarvestConfig
from sae_jax.subject import capture, transformer
from sae_jax.text import corpus

SITE = capture.Site(1, 'resid_post')
LOUD = ord('~')  # A token whose embedding is scaled up: an attention sink.


FAMILIES = {
  'llama': {},
  'gemma': {'post_norms': True, 'qk_norm': True, 'embed_scale': 4.0},
  'gpt2': {
    'norm': 'layer',
    'n_positions': 32,
    'qkv_bias': True,
    'attn_out_bias': True,
    'ffn_bias': True,
    'gated': False,
    'activation': 'gelu_tanh',
  },
}


@functools.cache
def subject(family='llama'):
  """A random model of bytes."""
  config = transformer.TransformerConfig(
    n_layers=3,
    d_model=16,
    n_heads=2,
    n_kv_heads=1,
    d_head=8,
    d_ff=32,
    vocab_size=256,
    rope_base=1e4,
    norm_eps=1e-5,
    rope_pairs='interleaved',
    **FAMILIES[family],
  )
  params = transformer.init(config, jax.random.key(0))
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {text: i for i, text in enumerate(alphabet)}
  loud = vocabulary[chr(LOUD)]
  params['embed'] = params['embed'].at[loud].multiply(1000)
  tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  return subject_lib.Subject('toy', config, params, tokenizer, 'cafe')


def config(path, **changes):
  """Of a harvest of the toy; keyword arguments replace fields."""
  return HarvestConfig(
    **{
      'subject': 'toy',
      'sites': (str(SITE),),
      'sources': (str(path),),
      'n_tokens': 10**6,
      'context_length': 20,
      'max_contexts_per_document': 3,
      'min_context_tokens': 4,
      'batch_contexts': 4,
      'chunk_rows': 32,
      'shard_rows': 64,
      'mask_norm_multiple': 0.0,
      'mesh_data': 1,
    }
    | changes
  )


def write_texts(folder):
  """Eighty documents of 1 to 150 characters; some are cut, some skipped."""
  rng = np.random.default_rng(0)
  letters = np.array(list('abcdefgh .,\n'))
  path = folder / 'texts.jsonl'
  lines = [
    f'{i} ' + ''.join(rng.choice(letters, rng.integers(1, 150)))
    for i in range(80)
  ]
  path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in lines))
  return path


def run(harvest_config, url):
  """Harvests to a store."""
  return harvest.harvest(harvest_config, str(url), subject())


def expected_contexts(harvest_config):
  """(document, tokens) of every context, from the definition."""
  contexts, number = [], 0
  sources, seed = harvest_config.sources, harvest_config.seed
  for document in corpus.documents(sources, seed, 3 * 20 * 4):
    ids = subject().tokenizer.encode(document.text).ids
    pieces = [ids[:20], ids[20:40], ids[40:60]]
    pieces = [piece for piece in pieces if len(piece) >= 4]
    contexts += [(number, piece) for piece in pieces]
    number += bool(pieces)
  return contexts


def resid(tokens):
  """Activations of one context on its own, unpadded."""
  toy = subject()
  # Padded on the right to one shape: causal attention does not see it.
  tokens_BT = np.full((1, 20), 7)
  tokens_BT[0, : len(tokens)] = tokens
  run = jax.jit(capture.capture, static_argnames=('config', 'site'))
  return np.asarray(run(toy.config, toy.params, tokens_BT, SITE))[
    0, : len(tokens)
  ]


def stored(folder):
  """What is in a store; a killed writer may leave locks, which none reads."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file() and not path.name.endswith('.__lock')
  }
