"""Texts as users have them, from the file to the stored tokens."""

import gzip
import json

import numpy as np
import pytest

from sae_jax import errors, store
from sae_jax import subject as subject_lib
from sae_jax.harvesting import harvest
from sae_jax.harvesting import source as source_lib
from sae_jax.subject.formats import tokenizer as tokenizer_lib
from sae_jax.text import corpus
from tests.support import toy

CONTROL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
CHAT = (
  '<|im_start|>user\nhello {}<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>'
)


@pytest.fixture(scope='module')
def subject(tmp_path_factory):
  """The toy, its tokenizer from a folder whose files ask for a BOS."""
  folder = tmp_path_factory.mktemp('subject')
  tokenizer = tokenizer_lib.reading_control_tokens(toy.subject().tokenizer)
  # In place of bytes that no text has: the embedding has no more rows.
  saved = json.loads(tokenizer.to_str())
  vocab = saved['model']['vocab']
  for token, text in zip(sorted(vocab, key=vocab.get)[-3:], CONTROL):
    vocab[text] = vocab.pop(token)
  (folder / 'tokenizer.json').write_text(json.dumps(saved))
  tokenizer = tokenizer_lib.from_folder(folder)
  tokenizer.add_special_tokens(CONTROL)
  tokenizer.save(str(folder / 'tokenizer.json'))
  settings = {'add_bos_token': True, 'bos_token': CONTROL[0]}
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
  loaded = tokenizer_lib.from_folder(folder)
  toys = toy.subject()
  return subject_lib.Subject('toy', toys.config, toys.params, loaded, 'cafe')


def contexts(subject, source, **changes):
  """The tokens of each context of a harvest of a file."""
  config = toy.config(source, max_contexts_per_document=8, **changes)
  text = source_lib.documents(config)
  return [x.tokens for x in source_lib.contexts(config, text, subject)]


def spelled(subject, contexts):
  """What contexts spell, without their first token."""
  return [
    tokenizer_lib.decode(subject.tokenizer, context[1:]) for context in contexts
  ]


def test_chats_are_read_with_their_control_tokens(subject, tmp_path, caplog):
  path = tmp_path / 'chats.jsonl'
  chats = [CHAT.format(i) for i in range(9)]
  path.write_text(''.join(json.dumps({'text': x}) + '\n' for x in chats))
  changes = {'special_tokens': True, 'context_length': 64}
  read = contexts(subject, path, **changes)
  bos, start, end = map(subject.tokenizer.token_to_id, CONTROL)
  assert sorted(spelled(subject, read)) == chats
  for context in read:
    assert context[0] == bos
    assert [np.sum(context == x) for x in (bos, start, end)] == [1, 2, 2]
  assert 'control tokens' not in caplog.text
  # Without the flag they are characters, and the log says so, once.
  read = contexts(subject, path, context_length=64)
  assert not any(np.isin(context, [start, end]).any() for context in read)
  assert caplog.text.count('spells control tokens (<|im_start|>, <|im') == 1
  # The store says how it was read.
  config = toy.config(path, holdout_fraction=0.0, **changes)
  manifest = harvest.harvest(config, str(tmp_path / 'store'), subject)
  assert manifest.bos == CONTROL[0]
  assert manifest.config['special_tokens']
  opened = store.open_store(str(tmp_path / 'store'))
  want = np.concatenate(contexts(subject, path, **changes))
  np.testing.assert_array_equal(opened.tokens(), want)
  # The BOS is in no row.
  assert manifest.n_rows == len(want) - len(chats)


def test_stories_are_documents_and_their_separators_no_text(subject, tmp_path):
  stories = [f'Once {i}, a fox.\n\nIt ran and ran.' for i in range(30)]
  path = tmp_path / 'TinyStories-valid.txt'
  path.write_text('\n<|endoftext|>\n'.join(stories))
  read = contexts(subject, path, context_length=64)
  assert sorted(spelled(subject, read)) == sorted(stories)


@pytest.mark.parametrize('pack', [False, True])
def test_a_mark_and_packing_are_read_over(subject, tmp_path, pack):
  lines = [f'naïve text {i}' for i in range(20)]
  data = ''.join(json.dumps({'text': x}) + '\n' for x in lines).encode()
  plain, other = tmp_path / 'a.jsonl', tmp_path / 'b.jsonl'
  plain.write_bytes(data)
  other.write_bytes(gzip.compress(b'\xef\xbb\xbf' + data))
  want, got = (
    contexts(subject, path, pack=pack, min_context_tokens=1)
    for path in (plain, other)
  )
  assert len(want) == len(got) > 5
  for a, b in zip(want, got):
    np.testing.assert_array_equal(a, b)
    assert a[0] == subject.tokenizer.token_to_id(CONTROL[0])


def test_rows_that_are_null(subject, tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "one two"}\n{"text": null}\n' * 3)
  with pytest.raises(errors.UserError, match=r'line 2 of .*--skip_bad_rows'):
    contexts(subject, path)
  read = contexts(subject, path, skip_bad_rows=True)
  assert spelled(subject, read) == ['one two']


def test_a_harvest_that_a_bad_row_ended_goes_on(texts, tmp_path):
  lines = texts.read_text().splitlines(keepends=True)[:40]
  path = tmp_path / 'some.jsonl'
  with pytest.MonkeyPatch.context() as patch:
    # Texts are shuffled in blocks: the row is in the second.
    patch.setattr(corpus, '_FILE_BLOCK', 30)
    path.write_text(''.join([*lines[:35], '{}\n', *lines[35:]]))
    url = tmp_path / 'store'
    with pytest.raises(errors.UserError, match=r'line 36 .*--skip_bad_rows'):
      toy.run(toy.config(path), url)
    complete = {n: x for n, x in toy.stored(url).items() if 'shards/' in n}
    assert len(complete) > 3
    manifest = toy.run(toy.config(path, skip_bad_rows=True), url)
    assert manifest.config['skip_bad_rows']
    stored = toy.stored(url)
    assert {name: stored[name] for name in complete} == complete
    # And so does one that was finished before it met the row.
    other = tmp_path / 'other'
    first = toy.run(toy.config(path, n_tokens=300), other)
    assert not first.config['skip_bad_rows']
    more = toy.run(toy.config(path, n_tokens=10**6, skip_bad_rows=True), other)
    assert more.n_rows == manifest.n_rows
    with pytest.raises(errors.UserError, match='skip_bad_rows: True -> False'):
      toy.run(toy.config(path, n_tokens=10**6), other)
