"""What a tokenizer's files say beside text -> tokens."""

import json
import types

import pytest
import tokenizers
from tokenizers import models, processors

from sae_jax import errors
from sae_jax import subject as subject_lib
from sae_jax.subject.formats import tokenizer as tokenizer_lib
from sae_jax.text import contexts as contexts_lib
from sae_jax.text import corpus
from tests.support import made_documents

TEXT = 'it is text'


def tokenizer():
  result = made_documents.byte_tokenizer()
  result.add_special_tokens(['</s>'])
  return result


BOS, EOS = (tokenizer().token_to_id(text) for text in ('<s>', '</s>'))
ADDED = [('<s>', BOS), ('</s>', EOS)]


def template(single):
  return processors.TemplateProcessing(single=single, special_tokens=ADDED)


def from_folder(folder, saved, settings=None):
  (folder / 'tokenizer.json').write_text(saved.to_str())
  if settings is not None:
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
  return tokenizer_lib.from_folder(folder)


def metadata(**changes):
  """The same tokenizer as GGUF's converter writes it."""
  vocab = tokenizer().get_vocab()
  tokens = sorted(vocab, key=vocab.get)
  return {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'gpt-2',
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.token_type': [3 if len(x) > 1 else 1 for x in tokens],
    'tokenizer.ggml.merges': [],
  } | {f'tokenizer.ggml.{name}': value for name, value in changes.items()}


def padded(saved):
  saved.enable_padding(length=30, pad_id=EOS, pad_token='</s>')


def truncated(saved):
  saved.enable_truncation(4, stride=2)


def random_merges(saved):
  saved.model = models.BPE(saved.get_vocab(False), [], dropout=0.5)


def twice(saved):
  saved.post_processor = template('<s> $A $A </s>')


@pytest.mark.parametrize('setting', [padded, truncated, random_merges, twice])
def test_other_settings_do_not_change_the_tokens(tmp_path, setting):
  want = tokenizer().encode(TEXT).ids
  saved = tokenizer()
  setting(saved)
  loaded = from_folder(tmp_path, saved)
  assert tokenizer_lib.encode(loaded, TEXT) == want
  kept = json.loads(loaded.to_str())
  assert kept['padding'] is kept['truncation'] is None
  assert kept['model']['dropout'] is None
  # Control: the file's own tokens are others.
  if setting is not random_merges:
    assert saved.encode(TEXT).ids != want


@pytest.mark.parametrize(
  ('processor', 'settings', 'want'),
  [
    (None, None, None),
    (None, {'add_bos_token': True, 'bos_token': '<s>'}, BOS),
    (None, {'add_bos_token': True, 'bos_token': {'content': '<s>'}}, BOS),
    (None, {'add_bos_token': None, 'bos_token': '<s>'}, None),
    (template('<s> $A'), None, BOS),
    (template('<s> $A'), {'bos_token': '</s>'}, BOS),
    (template('<s> $A'), {'add_bos_token': True, 'bos_token': '<s>'}, BOS),
    (template('<s> $A'), {'add_bos_token': False}, None),
    (template('$A </s>'), None, None),
    (processors.ByteLevel(), None, None),
    (
      processors.Sequence([processors.ByteLevel(), template('<s> $A')]),
      {},
      BOS,
    ),
    (processors.RobertaProcessing(ADDED[1], ADDED[0]), None, BOS),
  ],
)
def test_the_files_say_what_contexts_begin_with(
  tmp_path, processor, settings, want
):
  saved = tokenizer()
  if processor is not None:
    saved.post_processor = processor
  loaded = from_folder(tmp_path, saved, settings)
  assert tokenizer_lib.context_start(loaded) == want
  assert tokenizer_lib.encode(loaded, 'a') == tokenizer().encode('a').ids
  assert tokenizer_lib.context_start(loaded, '') is None
  assert tokenizer_lib.context_start(loaded, '</s>') == EOS
  # A copy says the same.
  again = from_folder(tmp_path, loaded, {})
  assert tokenizer_lib.context_start(again) == want


def test_ids_that_are_not_read_are_pointed_out(tmp_path, caplog):
  fields = json.loads(tokenizer().to_str())
  from_folder(tmp_path, tokenizer())
  assert 'not read' not in caplog.text
  path, vocab = tmp_path / 'tokenizer.json', fields['model']['vocab']
  texts = sorted(vocab, key=vocab.get)
  twice = vocab | {texts[5]: 3}
  for change, words in (
    ({'model': fields['model'] | {'vocab': twice}}, '1 tokens an id'),
    (
      {
        'added_tokens': [
          fields['added_tokens'][0] | {'content': 'new', 'id': 5}
        ]
      },
      f"as 'new' 5, which is read as {texts[5]!r}",
    ),
  ):
    path.write_text(json.dumps(fields | change))
    caplog.clear()
    tokenizer_lib.from_folder(tmp_path)
    assert words in caplog.text


def test_gguf_tokens_without_a_text_of_their_own_are_pointed_out(caplog):
  fields = metadata()
  tokenizer_lib.from_metadata(fields)
  assert 'tokens of the GGUF' not in caplog.text
  tokens = fields['tokenizer.ggml.tokens']
  tokenizer_lib.from_metadata(metadata(tokens=[*tokens[:-1], tokens[2]]))
  assert '1 tokens of the GGUF file have the text of a later one' in caplog.text


@pytest.mark.parametrize('name', ['token_type', 'scores'])
def test_gguf_lists_are_as_long_as_the_vocabulary(name):
  with pytest.raises(errors.UserError, match=f'1 entries of .*{name}'):
    tokenizer_lib.from_metadata(metadata(**{name: [1]}))


def test_a_token_after_texts_is_pointed_out(tmp_path, caplog):
  saved = tokenizer()
  saved.post_processor = template('<s> $A </s>')
  from_folder(tmp_path, saved)
  assert "ends every text with '</s>'" in caplog.text


@pytest.mark.parametrize(
  ('changes', 'want'),
  [
    ({}, None),
    ({'bos_token_id': BOS}, None),
    ({'add_bos_token': False, 'bos_token_id': BOS}, None),
    ({'add_bos_token': True, 'bos_token_id': BOS}, BOS),
    ({'pre': 'llama-bpe', 'bos_token_id': BOS}, BOS),
    ({'pre': 'tekken', 'bos_token_id': BOS}, BOS),
    ({'pre': 'llama-bpe', 'bos_token_id': BOS, 'add_bos_token': False}, None),
    ({'add_bos_token': True}, None),
    ({'add_bos_token': True, 'bos_token_id': 2**31}, None),
    ({'add_bos_token': True, 'bos_token_id': 0.5}, None),
  ],
)
def test_gguf_says_what_contexts_begin_with(caplog, changes, want):
  loaded = tokenizer_lib.from_metadata(metadata(**changes))
  assert tokenizer_lib.context_start(loaded) == want
  asked = changes.get('add_bos_token') and want is None
  assert ('unless --bos names one' in caplog.text) == bool(asked)


def test_pieces_of_llama_begin_with_a_bos():
  pieces = {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.tokens': ['<unk>', '<s>', '▁', 'a'],
    'tokenizer.ggml.token_type': [2, 3, 1, 1],
    'tokenizer.ggml.scores': [0.0, 0.0, -1.0, -2.0],
  }
  assert tokenizer_lib.context_start(tokenizer_lib.from_metadata(pieces)) == 1
  no = pieces | {'tokenizer.ggml.add_bos_token': False}
  assert tokenizer_lib.context_start(tokenizer_lib.from_metadata(no)) is None


@pytest.mark.parametrize('pack', [False, True])
def test_both_formats_of_a_model_give_the_same_contexts(tmp_path, pack):
  asks = {'add_bos_token': True, 'bos_token_id': BOS}
  saved = tokenizer()
  saved.post_processor = template('<s> $A')
  (tmp_path / 'other').mkdir()
  folder, config, gguf, none = (
    list(
      contexts_lib.contexts(
        made_documents.documents(made_documents.LENGTHS),
        loaded,
        context_length=16,
        pack=pack,
        bos=tokenizer_lib.context_start(loaded),
      )
    )
    for loaded in (
      from_folder(tmp_path, saved),
      from_folder(
        tmp_path / 'other',
        tokenizer(),
        {'add_bos_token': True, 'bos_token': '<s>'},
      ),
      tokenizer_lib.from_metadata(metadata(**asks)),
      tokenizer_lib.from_metadata(metadata()),
    )
  )
  made_documents.assert_same(folder, gguf)
  made_documents.assert_same(config, gguf)
  assert all(context.tokens[0] == BOS for context in gguf)
  # Control: without the metadata they are others.
  assert not any(context.tokens[0] == BOS for context in none)


def test_control_tokens_are_read_where_this_is_wanted(tmp_path):
  loaded = from_folder(tmp_path, tokenizer())
  text = 'a<s>b</s>'
  assert not {BOS, EOS} & set(tokenizer_lib.encode(loaded, text))
  reading = tokenizer_lib.reading_control_tokens(loaded)
  a, b = tokenizer().encode('ab').ids
  assert tokenizer_lib.encode(reading, text) == [a, BOS, b, EOS]
  assert not {BOS, EOS} & set(tokenizer_lib.encode(loaded, text))


def subject(tokens, n_rows):
  config = types.SimpleNamespace(vocab_size=n_rows)
  return subject_lib.Subject('toy', config, {}, tokens, 'cafe')


def test_ids_beyond_the_embedding_are_refused():
  n_ids = BOS  # The bytes; control tokens come after them.
  subject(tokenizer(), n_ids)
  # A text does not give control tokens, other added ones it does.
  added = tokenizer()
  added.add_tokens(['that'])
  with pytest.raises(
    errors.UserError,
    match=r"token 'that' of subject toy has the id 258, the embedding has 258 "
    'rows: resize',
  ):
    subject(added, 258)
  subject(added, 259)
  with pytest.raises(errors.UserError, match='has 255 rows'):
    subject(tokenizer(), n_ids - 1)
  # What reads control tokens may give those too.
  with pytest.raises(errors.UserError, match="token '</s>' of subject toy"):
    tokenizer_lib.check_ids(
      tokenizer_lib.reading_control_tokens(tokenizer()), n_ids, 'toy'
    )
  # What contexts begin with is in them.
  begun = tokenizer()
  begun.post_processor = template('<s> $A')
  with pytest.raises(errors.UserError, match="token '<s>' of subject toy"):
    subject(begun, n_ids)
  with pytest.raises(errors.UserError, match="token '</s>' of subject toy"):
    tokenizer_lib.check_ids(tokenizer(), n_ids, 'toy', EOS)
  # A model's own vocabulary has no exceptions.
  own = tokenizers.Tokenizer(models.WordLevel({'a': 0, '<s>': 1}, 'a'))
  own.add_special_tokens(['<s>'])
  own.encode_special_tokens = True
  with pytest.raises(errors.UserError, match="token '<s>'"):
    subject(own, 1)


NESTED = {'type': 'Whitespace'}
for _ in range(120):
  NESTED = {'type': 'Sequence', 'pretokenizers': [NESTED]}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'pre_tokenizer': NESTED}, r'nested 2\d\d deep'),
    ({'model': None}, 'is not a tokenizer'),
    ({'model': {'type': 'WordLevel', 'vocab': {'a': 2**32}}}, 'not a token'),
    (
      {'model': {'type': 'WordLevel', 'vocab': {'a': 2**31}, 'unk_token': 'a'}},
      'a token has the id 2147483648',
    ),
    ({'post_processor': {'type': 'None'}}, 'is not a tokenizer'),
    (
      {
        'post_processor': {
          'type': 'TemplateProcessing',
          'single': [],
          'pair': [],
          'special_tokens': {},
        }
      },
      'leaves out every text',
    ),
  ],
)
def test_damaged_files_are_one_line(tmp_path, change, message):
  saved = json.loads(tokenizer().to_str()) | change
  (tmp_path / 'tokenizer.json').write_text(json.dumps(saved))
  with pytest.raises(errors.UserError, match=message) as caught:
    tokenizer_lib.from_folder(tmp_path)
  assert str(caught.value).endswith(' again')


def test_a_bos_that_is_no_token_is_pointed_out(tmp_path, caplog):
  settings = {'add_bos_token': True, 'bos_token': '<nothing>'}
  loaded = from_folder(tmp_path, tokenizer(), settings)
  assert tokenizer_lib.context_start(loaded) is None
  assert "bos_token '<nothing>' is no token: contexts begin" in caplog.text
  # It may be named beside.
  (tmp_path / 'special_tokens_map.json').write_text('{"bos_token": "<s>"}')
  loaded = from_folder(tmp_path, tokenizer(), {'add_bos_token': True})
  assert tokenizer_lib.context_start(loaded) == BOS


def test_a_bos_that_is_none_is_refused(tmp_path):
  saved = tokenizer()
  saved.post_processor = template('<s> </s> $A')
  loaded = from_folder(tmp_path, saved, {})
  with pytest.raises(errors.UserError, match=r'2 tokens, .* with --bos'):
    tokenizer_lib.context_start(loaded)
  with pytest.raises(errors.UserError, match="bos '<no>' is no token"):
    tokenizer_lib.context_start(loaded, '<no>')


def test_a_panic_of_the_library_is_one_line():
  """A pattern that takes for ever is given up with a panic."""
  slow = tokenizer()
  slow.pre_tokenizer = tokenizers.pre_tokenizers.Split(
    tokenizers.Regex('(a+)+$'), 'isolated'
  )
  text = [corpus.Document('source', 0, 'a' * 40 + 'b')]
  with pytest.raises(
    errors.UserError,
    match=r'document 0, of source, cannot be tokenized .*retry',
  ):
    list(contexts_lib.contexts(text, slow, context_length=16))
  with pytest.raises(errors.UserError, match=r"'aaaa.*' cannot be tokenized"):
    tokenizer_lib.encode(slow, text[0].text)


@pytest.mark.parametrize('value', [None, 1, [], ['a', 'a'], 'x'])
@pytest.mark.parametrize('name', ['tokens', 'token_type', 'merges'])
def test_metadata_of_other_types_is_one_line(name, value):
  changed = metadata(**{name: value})
  try:
    tokenizer_lib.from_metadata(changed)
  except errors.UserError as error:
    assert 'GGUF' in str(error)


def test_every_id_has_a_string():
  """Also where ids have holes, and entries are not spelled in bytes."""
  vocab = tokenizer().get_vocab(False) | {'[PAD 漢]': 300}
  sparse = tokenizer()
  sparse.model = models.BPE(vocab, [])
  strings = tokenizer_lib.token_texts(sparse)
  assert strings[300] == '[PAD 漢]'
  assert len(strings) == 301
  assert strings[299] == ''
  letter = tokenizer().token_to_id('a')
  assert strings[letter] == 'a'
