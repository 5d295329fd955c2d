"""Tokenizers of each family from GGUF metadata against references.

The references are pipelines as the families' tokenizer.json have them, and
SentencePiece itself, trained here on a little text.
"""

import inspect
import io
import json
import random
import textwrap

import gguf
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from sae_jax import subject
from sae_jax.subject.formats import tokenizer as tokenizer_lib

# Word for word as in the families' tokenizer.json.
LLAMA = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
QWEN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
TEKKEN = (
  r'[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*'
  r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]+'
  r'|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+'
  r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]*'
  r'|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
# tokenizer.ggml.pre -> pattern, NFC, ignore_merges.
PUBLISHED = {
  'gpt-2': (None, False, False),
  'olmo': (None, True, False),
  'mpt': (None, True, False),
  'llama-bpe': (LLAMA, False, True),
  'qwen2': (QWEN, True, False),
  'tekken': (TEKKEN, False, True),
}
CONTROL, USERS = '<|end|>', ['   ', '<think>']
CORPUS = [
  *(inspect.getsource(x) for x in (json, textwrap, inspect.getsource)),
  "It's 1863; they'Ve 12345 of 3.14, WE'LL see: camelCase HTMLParser a/b/c.",
  'Über die Brücke, à Noël, ¿qué más? naïve cafe\u0301s cafés',
  'Съешь ещё этих мягких французских булок. Η γρήγορη αλεπού.',
  '敏捷的棕色狐狸跳过了懒狗。日本語のテキストです。빠른 갈색 여우',
  'الثعلب البني السريع ١٢٣ תפוח तेज़ भूरी लोमड़ी',
] * 3
ALPHABETS = [
  'abcdefghij',
  'ABCDE',
  '0123456789',
  ' ',
  ' \n\t\r',
  '.,;:!?\'"()[]<>/\\|@#$%-_=+',
  'éàüßñ',
  'e\u0301a\u0308\u0323\u0307',
  'жщёαλ狐狸日本여우ةثतेज़',
  '🙂🚀\u200d\ufe0f\U0001f468',
  '\x00\x07\x1b\x7f\x85\xa0\u2003\u3000\ufeff',
  ["'s", "'LL", "'ſ", ' the', 'self', 'ing', '<think>', CONTROL, '</s>', '▁'],
]


def texts():
  rng = random.Random(0)
  random_texts = [
    ''.join(
      ''.join(rng.choice(alphabet) for _ in range(rng.randint(1, 9)))
      for alphabet in rng.choices(ALPHABETS, k=rng.randint(1, 9))
    )
    for _ in range(400)
  ]
  spaces = [' ' * n + 'x' for n in range(70)]
  return ['', 'a.\n/b', *CORPUS[: len(CORPUS) // 3], *random_texts, *spaces]


TEXTS = texts()


def differing(tokenizer, ids_of):
  """How many of TEXTS a reference gives other ids."""
  return sum(tokenizer_lib.encode(tokenizer, x) != ids_of(x) for x in TEXTS)


def cuts(tokenizer):
  """Where each of TEXTS is cut before merging, whatever the vocabulary."""
  return [tokenizer.pre_tokenizer.pre_tokenize_str(text) for text in TEXTS]


def published(pre):
  """A small tokenizer of the structure of a family's tokenizer.json."""
  pattern, composed, whole_first = PUBLISHED[pre]

  def with_stages(model):
    result = tokenizers.Tokenizer(model)
    if composed:
      result.normalizer = normalizers.NFC()
    if pattern:
      result.pre_tokenizer = pre_tokenizers.Sequence(
        [
          pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated'),
          pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
      )
    else:
      result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    return result

  trained = with_stages(models.BPE())
  trainer = trainers.BpeTrainer(
    vocab_size=1200,
    show_progress=False,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
  )
  trained.train_from_iterator(CORPUS, trainer)
  model = json.loads(trained.to_str())['model']
  vocab, merges = model['vocab'], model['merges']
  # No merges lead to it, as with some of Llama 3's.
  vocab['Ġjagged'] = len(vocab)
  result = with_stages(
    models.BPE(vocab, [tuple(x) for x in merges], ignore_merges=whole_first)
  )
  result.add_special_tokens([CONTROL])
  result.add_tokens(USERS)
  result.encode_special_tokens = True
  return result, merges


def as_metadata(tokenizer, merges, pre):
  """As GGUF's converter writes it, with two tokens to fill the vocabulary."""
  vocab = tokenizer.get_vocab()
  tokens = [*sorted(vocab, key=vocab.get), '[PAD1]', '[PAD2]']
  kinds = [4 if x in USERS else 3 if x == CONTROL else 1 for x in tokens[:-2]]
  return {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': pre,
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.token_type': [*kinds, 5, 5],
    'tokenizer.ggml.merges': [' '.join(merge) for merge in merges],
    'tokenizer.ggml.add_bos_token': True,
  }


@pytest.mark.parametrize('pre', PUBLISHED)
def test_byte_level_ids_equal_the_published_pipeline(pre):
  reference, merges = published(pre)

  def ids_of(text):
    return reference.encode(text).ids

  metadata = as_metadata(reference, merges, pre)
  tokenizer = tokenizer_lib.from_metadata(metadata)
  assert differing(tokenizer, ids_of) == 0
  assert cuts(tokenizer) == cuts(reference)
  whole = tokenizer_lib.encode(tokenizer, 'a jagged') == [
    reference.token_to_id('a'),
    reference.token_to_id('Ġjagged'),
  ]
  assert whole == PUBLISHED[pre][2]
  # Controls: any other family's way to cut, and merges in another order.
  for other, published_as in PUBLISHED.items():
    if published_as != PUBLISHED[pre]:
      wrong = metadata | {'tokenizer.ggml.pre': other}
      assert differing(tokenizer_lib.from_metadata(wrong), ids_of) > 0, other
  wrong = metadata | {
    'tokenizer.ggml.merges': metadata['tokenizer.ggml.merges'][::-1]
  }
  assert differing(tokenizer_lib.from_metadata(wrong), ids_of) > 0


def test_composed_characters_are_decoded():
  reference, merges = published('qwen2')
  tokenizer = tokenizer_lib.from_metadata(
    as_metadata(reference, merges, 'qwen2')
  )
  tokens = tokenizer_lib.encode(tokenizer, 'cafe\u0301')
  assert tokenizer_lib.decode(tokenizer, tokens) == 'caf\u00e9'


# With a space in front and no user's tokens, as Llama 2; without and with
# them, as Gemma 2 and 3. '▁' is their space.
PIECES = {
  'llama': {'add_dummy_prefix': True},
  'gemma': {
    'add_dummy_prefix': False,
    'user_defined_symbols': ['\n', '\n\n', '<b>', *('▁' * n for n in (2, 3))],
  },
}


@pytest.fixture(scope='module', params=PIECES)
def sentencepiece_model(request):
  """The library's tokenizer and what GGUF's converter makes of it."""
  library = pytest.importorskip('sentencepiece')
  stream = io.BytesIO()
  options = PIECES[request.param]
  library.SentencePieceTrainer.train(
    sentence_iterator=iter(x for text in CORPUS for x in text.split('\n')),
    model_writer=stream,
    model_type='bpe',
    vocab_size=1200,
    character_coverage=0.99,
    byte_fallback=True,
    split_digits=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    minloglevel=2,
    **options,
  )
  model = library.SentencePieceProcessor(model_proto=stream.getvalue())
  tokens, scores, kinds = [], [], []
  for i in range(model.vocab_size()):
    tokens.append(model.id_to_piece(i))
    scores.append(model.get_score(i))
    kinds.append(
      2
      if model.is_unknown(i)
      else 3
      if model.is_control(i)
      else 6
      if model.is_byte(i)
      else 1
    )
    if tokens[-1] in options.get('user_defined_symbols', []):
      tokens[-1] = tokens[-1].replace('▁', ' ')
      scores[-1], kinds[-1] = -1000.0, 4
  return model, {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.pre': 'default',
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.scores': scores,
    'tokenizer.ggml.token_type': kinds,
    'tokenizer.ggml.add_space_prefix': options['add_dummy_prefix'],
    'tokenizer.ggml.add_bos_token': True,
  }


def test_ids_equal_those_of_sentencepiece(sentencepiece_model):
  model, metadata = sentencepiece_model
  tokenizer = tokenizer_lib.from_metadata(metadata)
  assert differing(tokenizer, model.encode) == 0
  # Controls: the worst piece first, a space too many or too few.
  scores = metadata['tokenizer.ggml.scores']
  prefix = metadata['tokenizer.ggml.add_space_prefix']
  for wrong in (
    {'tokenizer.ggml.scores': [-score for score in scores]},
    {'tokenizer.ggml.add_space_prefix': not prefix},
  ):
    tokenizer = tokenizer_lib.from_metadata(metadata | wrong)
    assert differing(tokenizer, model.encode) > 0


def test_pieces_are_decoded_and_shown(sentencepiece_model):
  model, metadata = sentencepiece_model
  tokenizer = tokenizer_lib.from_metadata(metadata)
  for text in TEXTS:
    tokens = tokenizer_lib.encode(tokenizer, text)
    assert tokenizer_lib.decode(tokenizer, tokens) == text.replace('▁', ' ')
  strings = tokenizer_lib.token_texts(tokenizer)
  assert len(strings) == model.vocab_size()
  assert not any('▁' in text for text in strings if isinstance(text, str))
  assert '<s>' in strings and b'\xff' in strings


def test_a_file_with_pieces(sentencepiece_model, tmp_path):
  model, metadata = sentencepiece_model
  path = str(tmp_path / 'vocabulary.gguf')
  writer = gguf.GGUFWriter(path, 'llama')
  value = {key.rpartition('.')[2]: x for key, x in metadata.items()}
  writer.add_tokenizer_model(value['model'])
  writer.add_token_list(value['tokens'])
  writer.add_token_scores(value['scores'])
  writer.add_token_types(value['token_type'])
  writer.add_add_space_prefix(value['add_space_prefix'])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  assert differing(subject.load_tokenizer(path), model.encode) == 0
