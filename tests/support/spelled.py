"""A subject that knows the first letters of its words, by construction.

The stream of a word is the direction of its letter and one of its own; blocks
add nothing. Autoencoders for it have a latent for each letter, which either
reads the letter of every word, or is silent on the first word of each letter,
for which a latent of its own holds both directions.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from sae_jax import checkpoint, subject
from sae_jax import mesh as mesh_lib
from sae_jax.autoencoder import SaeConfig
from sae_jax.probing import reconstruction
from sae_jax.probing.scan import run as scan_run
from sae_jax.probing.suite import letters
from sae_jax.subject import transformer

PER_LETTER = 9
# How far the direction that only a letter's first word has reaches.
_OWN = 2.0
_N_LETTERS = len(letters.LETTERS)
D_MODEL = 2 * _N_LETTERS + 12
CONFIG = transformer.TransformerConfig(
  n_layers=1,
  d_model=D_MODEL,
  n_heads=2,
  n_kv_heads=1,
  d_head=8,
  d_ff=8,
  vocab_size=7 + _N_LETTERS * (PER_LETTER + 1),
  rope_base=1e4,
  norm_eps=1e-5,
  rope_pairs='half',
)
_OTHERS = ('\n', ' has', ' the', ' first', ' letter', ':', '?')


def words():
  """The words that have a letter's direction, letter by letter."""
  return [
    f' {letter}{"bcdefghij"[i]}q'
    for letter in letters.LETTERS
    for i in range(PER_LETTER)
  ]


@functools.cache
def make_subject():
  answers = [f' {letter.upper()}' for letter in letters.LETTERS]
  vocabulary = [*_OTHERS, *answers, *words()]
  tokenizer = tokenizers.Tokenizer(
    models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token='?')
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Split(
    tokenizers.Regex(' ?[A-Za-z]+|\n|:'), 'isolated'
  )
  params = transformer.init(CONFIG, jax.random.key(0))
  blocks = params['blocks']
  blocks = blocks | {
    name: jnp.zeros_like(blocks[name]) for name in ('attn_out', 'down')
  }
  embed = np.zeros((CONFIG.vocab_size, D_MODEL), np.float32)
  rng = np.random.default_rng(0)
  for token, text in enumerate(vocabulary):
    embed[token, 2 * _N_LETTERS :] = 0.05 * rng.standard_normal(12)
    if text[0] == ' ' and token >= len(_OTHERS):
      letter = letters.number(text)
      embed[token, letter] = 1
      if text == words()[letter * PER_LETTER]:
        embed[token, _N_LETTERS + letter] = _OWN
  params = params | {'blocks': blocks, 'embed': jnp.asarray(embed)}
  return subject.Subject('spelled', CONFIG, params, tokenizer, 'c' * 64)


def make_trained(absorbs, length=1.0, activation='relu', mesh=None):
  """An autoencoder of 64 latents.

  Args:
    absorbs: whether latents of words have taken over those of letters.
    length: of the decoder rows; activations are as much smaller.
    activation: its nonlinearity.
    mesh: where it is put; None for one device.
  """
  config = SaeConfig(
    d_model=D_MODEL,
    n_latents=64,
    k=2,
    activation=activation,
    preprocessing='none',
  )
  sample_BD = np.random.default_rng(0).standard_normal((64, D_MODEL), 'f4')
  fresh = reconstruction.untrained(config, sample_BD, 3)
  w_enc_ND = np.zeros((64, D_MODEL), np.float32)
  w_dec_ND = np.zeros((64, D_MODEL), np.float32)
  for letter in range(_N_LETTERS):
    word, own = _N_LETTERS + letter, _N_LETTERS + letter
    w_enc_ND[letter, letter] = w_dec_ND[letter, letter] = 1
    w_enc_ND[word, own] = w_dec_ND[word, own] = 1
    if absorbs:
      w_enc_ND[letter, own] = -1
      w_dec_ND[word, letter] = 1 / _OWN
  mesh = mesh or mesh_lib.one_device()
  sae = fresh.sae.replace(
    w_enc_ND=jnp.asarray(w_enc_ND / length),
    w_dec_ND=jnp.asarray(w_dec_ND * length),
    b_lat_N=jnp.zeros(64),
    b_pre_D=jnp.zeros(D_MODEL),
    extra={
      # Below what any word has, above what answers no letter.
      name: jnp.full_like(of, np.log(0.01) if 'log' in name else 0.01)
      for name, of in fresh.sae.extra.items()
    },
  )
  sae = scan_run.on_mesh(sae, mesh)
  return dataclasses.replace(
    checkpoint.Trained(config, sae, fresh.mse_of_mean, 7), sae=sae
  )
