"""Tokenizers from GGUF metadata: a small one."""

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import tokenizers
from tokenizers import pre_tokenizers

from sae_jax import errors
from sae_jax.subject.formats import tokenizer as tokenizer_lib
from tests.support.pieces import pieces


def small_metadata(**changes):
  """One token a byte, a few merges, a control and a user's token.

  In byte-level BPE 'Ġ' spells a space and 'Ã©' the two bytes of 'é'.
  """
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  merges = ['Ġ t', 'h e', 'Ġt he', '1 2', 'Ã ©', 'ã ģ', 'Ġ Ã']
  merged = [merge.replace(' ', '') for merge in merges]
  tokens = ['<|end|>', '<user>', *letters, *merged]
  return {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'smollm',
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.merges': merges,
    'tokenizer.ggml.token_type': [3, 4] + [1] * (len(tokens) - 2),
  } | changes


SMALL = tokenizer_lib.from_metadata(small_metadata())


@settings(deadline=None, max_examples=100)
@given(st.text())
def test_any_text_round_trips(text):
  tokens = tokenizer_lib.encode(SMALL, text)
  assert tokenizer_lib.decode(SMALL, tokens) == text


def test_merges_and_digits():
  assert pieces(SMALL, 'a the 1212') == ['a', ' the', ' ', '1', '2', '1', '2']
  whole = tokenizer_lib.from_metadata(
    small_metadata(**{'tokenizer.ggml.pre': 'gpt-2'})
  )
  assert pieces(whole, 'a the 1212') == ['a', ' the', ' ', '12', '12']


def test_tokens_are_text_and_pieces_of_characters_bytes():
  assert pieces(SMALL, 'é') == ['é']
  assert pieces(SMALL, 'は') == [b'\xe3\x81', b'\xaf']
  assert pieces(SMALL, ' ô') == [b' \xc3', b'\xb4']
  assert pieces(SMALL, '\n\t\x00') == ['\n', '\t', '\x00']


def test_every_byte_has_its_own_token_string():
  strings = tokenizer_lib.token_texts(SMALL)
  assert len(strings) == SMALL.get_vocab_size()
  shown = {chr(i) if i < 128 else bytes([i]) for i in range(256)}
  assert set(strings[2:258]) == shown


def test_control_tokens_in_a_text_are_text():
  tokens = tokenizer_lib.encode(SMALL, 'a<|end|>b')
  assert 0 not in tokens
  assert tokenizer_lib.decode(SMALL, tokens) == 'a<|end|>b'
  # The token itself exists, is shown by its name and kept when decoding.
  assert tokenizer_lib.token_texts(SMALL)[0] == '<|end|>'
  assert tokenizer_lib.decode(SMALL, [0]) == '<|end|>'
  assert tokenizer_lib.encode(SMALL, 'a<user>b')[1] == 1


@pytest.mark.parametrize(
  'metadata, message',
  [
    (
      small_metadata(**{'tokenizer.ggml.model': 't5'}),
      "tokenizer 't5' with pre-tokenizer 'smollm' is not supported: "
      "use a GGUF file with 'gpt2' and one of gpt-2, smollm, olmo, mpt, "
      "llama-bpe, qwen2, tekken, or with 'llama'",
    ),
    (
      small_metadata(**{'tokenizer.ggml.pre': 'qwen35'}),
      "tokenizer 'gpt2' with pre-tokenizer 'qwen35' is not supported: "
      "use a GGUF file with 'gpt2' and one of gpt-2, smollm, olmo, mpt, "
      "llama-bpe, qwen2, tekken, or with 'llama'",
    ),
    (
      {
        key: value
        for key, value in small_metadata().items()
        if key != 'tokenizer.ggml.merges'
      },
      'the GGUF file does not hold tokenizer.ggml.merges: '
      'convert the model again',
    ),
  ],
)
def test_an_unknown_tokenizer_is_refused(metadata, message):
  with pytest.raises(errors.UserError) as error:
    tokenizer_lib.from_metadata(metadata)
  assert str(error.value) == message


def test_token_texts_reach_the_last_id_over_gaps():
  sparse = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({'a': 0, 'b': 5}, unk_token='a')
  )
  assert tokenizer_lib.token_texts(sparse) == ['a', '', '', '', '', 'b']


def piece_tokenizer():
  """As Llama 2 and Gemma have it: pieces with '▁', bytes as a last resort."""
  letters = ['<s>', '<unk>', *(f'<0x{i:02X}>' for i in range(256))]
  letters += ['▁', 'a', '▁a', 'b', '▁ab']
  merges = [('▁', 'a'), ('▁a', 'b')]
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      {text: i for i, text in enumerate(letters)},
      merges,
      unk_token='<unk>',
      byte_fallback=True,
    )
  )
  tokenizer.normalizer = tokenizers.normalizers.Replace(' ', '▁')
  tokenizer.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace('▁', ' '),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
    ]
  )
  tokenizer.add_special_tokens(['<s>', '<unk>'])
  return tokenizer


def test_a_tokenizer_of_pieces_from_its_file(tmp_path):
  piece_tokenizer().save(str(tmp_path / 'tokenizer.json'))
  tokenizer = tokenizer_lib.from_folder(tmp_path)
  assert pieces(tokenizer, 'a ab é') == ['a', ' ab', ' ', b'\xc3', b'\xa9']
  # Control tokens in a text are text here too, and bytes round trip.
  tokens = tokenizer_lib.encode(tokenizer, 'é<s>')
  assert 0 not in tokens
  assert tokenizer_lib.decode(tokenizer, tokens) == 'é<s>'
  SMALL.save(str(tmp_path / 'tokenizer.json'))
  again = tokenizer_lib.from_folder(tmp_path)
  for text in ('a the 1212', 'é<|end|>'):
    assert pieces(again, text) == pieces(SMALL, text)
