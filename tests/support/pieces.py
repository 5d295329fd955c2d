"""Texts as the strings of their tokens."""

from sae_jax.subject.formats import tokenizer as tokenizer_lib


def pieces(tokenizer, text):
  strings = tokenizer_lib.token_texts(tokenizer)
  return [strings[i] for i in tokenizer_lib.encode(tokenizer, text)]
