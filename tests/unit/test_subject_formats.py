"""One model in both formats: the same tokens give the same activations."""

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from sae_jax import subject
from sae_jax.subject import capture
from sae_jax.subject.formats import tokenizer as tokenizer_lib
from tests.support import gguf_models, hf_folder, made_documents

SITE = capture.Site(3, 'resid_post')
LINEAR = {'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 500.0}
# Each with what is easiest to read from one format alone.
FAMILIES = {
  'gpt2': {},
  'neox, a quarter rotary (Pythia)': {
    'rope_parameters': LINEAR | {'partial_rotary_factor': 0.25}
  },
  'llama 3 stretched positions': {},
  'qwen3, wide heads': {'rope_parameters': LINEAR},
  # GGUF has no key for the scale of scores.
  'gemma 2, caps and windows': {
    'attn_logit_softcapping': None,
    'query_pre_attn_scalar': 16,
  },
  'gemma 3, window of 5 in 6 blocks': {
    'final_logit_softcapping': 20.0,
    'query_pre_attn_scalar': 16,
  },
}


def byte_tokenizer():
  """The tokenizer that `gguf_models.write` writes."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {text: i for i, text in enumerate(['ab', *letters])}
  result = tokenizers.Tokenizer(models.BPE(vocabulary, [('a', 'b')]))
  result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  return result


def batch(loaded):
  """Tokens of some documents, of a length."""
  texts = [d.text for d in made_documents.documents([40, 64, 33])]
  tokens = [tokenizer_lib.encode(loaded.tokenizer, text) for text in texts]
  return np.stack([ids[:24] for ids in tokens])


@pytest.mark.parametrize('name', FAMILIES)
def test_both_formats_give_the_same_tokens_and_activations(name, tmp_path):
  record = gguf_models.of_bytes(name)
  record['config'] |= FAMILIES[name]
  url = hf_folder.write(tmp_path, record, tokenizer=False)
  (tmp_path / 'tokenizer.json').write_text(byte_tokenizer().to_str())
  path = gguf_models.write(tmp_path / 'm.gguf', record)
  folder, gguf = subject.load(url), subject.load(path)
  tokens_BT = batch(folder)
  np.testing.assert_array_equal(batch(gguf), tokens_BT)
  assert len(tokens_BT) > 2

  def logits_and_site(loaded):
    run = jax.jit(
      lambda params: capture.run(
        loaded.config, params, tokens_BT, record=(SITE,), logits=True
      )
    )
    out = run(loaded.params)
    return out.logits_BTV, out.recorded[SITE]

  for got, want in zip(logits_and_site(gguf), logits_and_site(folder)):
    np.testing.assert_allclose(got, want, atol=2e-5)
