"""One model in both formats: the same tokens give the same activations."""

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from sae_jax import subject
from sae_jax.subject import capture
from sae_jax.subject.formats import tokenizer as tokenizer_lib
from sae_jax.text import contexts
from tests.support import gguf_models, hf_folder, made_documents

SITE = capture.Site(3, 'resid_post')
BOS = 257
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
  """The tokenizer that `gguf_models.write` writes, with its BOS."""
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {text: i for i, text in enumerate(['ab', *letters])}
  result = tokenizers.Tokenizer(models.BPE(vocabulary, [('a', 'b')]))
  result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  result.add_special_tokens(['<s>'])
  result.post_processor = processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', BOS)]
  )
  return result


def batch(loaded):
  """The first contexts of some documents."""
  documents = made_documents.documents([40, 64, 33])
  found = contexts.contexts(
    documents,
    loaded.tokenizer,
    context_length=24,
    bos=tokenizer_lib.context_start(loaded.tokenizer),
  )
  return np.stack([c.tokens for c in found if len(c.tokens) == 24])


@pytest.mark.parametrize('name', FAMILIES)
def test_both_formats_give_the_same_tokens_and_activations(name, tmp_path):
  record = gguf_models.of_bytes(name, 258)
  record['config'] |= FAMILIES[name]
  url = hf_folder.write(tmp_path, record, tokenizer=False)
  (tmp_path / 'tokenizer.json').write_text(byte_tokenizer().to_str())
  path = gguf_models.write(tmp_path / 'm.gguf', record, bos=True)
  folder, gguf = subject.load(url), subject.load(path)
  tokens_BT = batch(folder)
  np.testing.assert_array_equal(batch(gguf), tokens_BT)
  assert (tokens_BT[:, 0] == BOS).all()
  assert len(tokens_BT) > 2

  def logits_and_site(loaded):
    run = jax.jit(
      lambda params: capture.run(
        loaded.config, params, tokens_BT, record=(SITE,), logits=True
      )
    )
    # In float64, as the weights of the two lie in another order, and float32
    # rounds their sums otherwise, on some processors by more than this.
    with jax.enable_x64(True):
      params = jax.tree.map(lambda a: np.asarray(a, np.float64), loaded.params)
      out = run(params)
    return out.logits_BTV, out.recorded[SITE]

  for got, want in zip(logits_and_site(gguf), logits_and_site(folder)):
    np.testing.assert_allclose(got, want, atol=2e-5)
