"""Text files: folders, globs, URLs, parquet, fields, and what is cut off."""

import importlib.util
import json
import random
import tracemalloc

import fsspec
import pytest

from sae_jax import errors
from sae_jax.text import corpus
from sae_jax.text import files as files_lib
from tests.support import text_sources


def test_parquet_gives_what_jsonl_gives(tmp_path):
  texts = [f'naïve {i}' for i in range(700)]
  table = text_sources.write_parquet(tmp_path / 'x.parquet', texts)
  lines = text_sources.write_jsonl(tmp_path / 'x.jsonl', texts)
  assert text_sources.texts((table,), seed=2) == text_sources.texts(
    (lines,), seed=2
  )


def test_a_field_is_named_after_the_source(tmp_path):
  path = tmp_path / 'x.jsonl'
  path.write_text('{"body": "b", "text": "t"}\n')
  assert text_sources.texts((str(path),), seed=0) == ['t']
  (document,) = corpus.documents((f'{path}#body',), seed=0)
  assert (document.text, document.source) == ('b', f'{path}#body')
  table = text_sources.write_parquet(tmp_path / 'x.parquet', ['one'], 'body')
  assert text_sources.texts((f'{table}#body',), seed=0) == ['one']
  # A name that was a file's stays one.
  odd = text_sources.write_jsonl(tmp_path / 'a#b.jsonl', ['odd'])
  assert text_sources.texts((odd,), seed=0) == ['odd']
  assert text_sources.texts((f'{odd}#text',), seed=0) == ['odd']


def test_a_folder_or_a_glob_is_all_its_files(tmp_path, monkeypatch):
  folder = tmp_path / 'data'
  lines, rows = text_sources.write_folder(folder)
  texts = text_sources.texts((str(folder),), seed=0)
  assert sorted(texts) == sorted([*lines, *rows, 'three'])
  assert texts != text_sources.texts((str(folder),), seed=1)
  # Where it lies, and how that is written, changes nothing.
  folder.rename(tmp_path / 'moved')
  monkeypatch.chdir(tmp_path)
  assert text_sources.texts(('moved/',), seed=0) == texts
  assert text_sources.texts(('moved/**',), seed=0) == texts
  assert sorted(text_sources.texts(('moved/*.jsonl',), seed=0)) == sorted(lines)
  assert sorted(
    text_sources.texts(('moved/[d]*/*.parquet',), seed=0)
  ) == sorted(rows)


def test_a_url_is_read_as_a_path_is(tmp_path):
  lines, rows = text_sources.write_folder(tmp_path / 'data')
  memory = fsspec.filesystem('memory')
  memory.put(str(tmp_path / 'data'), '/corpus', recursive=True)
  here = text_sources.texts((str(tmp_path / 'data'),), seed=0)
  assert text_sources.texts(('memory://corpus',), seed=0) == here
  assert sorted(
    text_sources.texts(('memory://corpus/*.jsonl',), seed=0)
  ) == sorted(lines)
  table = 'memory://corpus/deep/two.parquet'
  assert sorted(text_sources.texts((table,), seed=0)) == sorted(rows)


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    ('empty', r'empty holds none of the files .* among 0'),
    ('none-*.jsonl', 'holds none of the files'),
    ('nosuch://x/y.jsonl', 'cannot look for source nosuch:.*Protocol'),
    ('memory://gone/x.jsonl', 'does not exist'),
    ('book.txt#body', 'names a field, but .txt files have none'),
    ('x.parquet.gz', 'is not known'),
  ],
)
def test_wrong_places(tmp_path, monkeypatch, source, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'book.txt').write_text('text')
  (tmp_path / 'x.parquet.gz').write_bytes(b'')
  with pytest.raises(errors.UserError, match=message) as caught:
    corpus.documents((source,), seed=0)
  assert '\n' not in str(caught.value)


def test_pyarrow_is_asked_for_where_it_is_needed(tmp_path, monkeypatch):
  table = text_sources.write_parquet(tmp_path / 'x.parquet', ['one'])
  lines = text_sources.write_jsonl(tmp_path / 'x.jsonl', ['one'])
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert text_sources.texts((lines,), seed=0) == ['one']
  with pytest.raises(errors.UserError, match=r'install "sae_jax\[parquet\]"'):
    corpus.documents((table,), seed=0)


def test_a_field_that_is_not_there_is_named(tmp_path):
  path = tmp_path / 'x.jsonl'
  path.write_text('{"text": "a"}\n\n{"body": "b", "id": 1}\n')
  with pytest.raises(
    errors.UserError, match=r'line 3 of .*x\.jsonl .*`text`, it has body, id'
  ):
    text_sources.texts((str(path),), seed=0)
  table = text_sources.write_parquet(tmp_path / 'x.parquet', ['one', None])
  with pytest.raises(
    errors.UserError, match=r'no column `body`, it has n, text'
  ):
    text_sources.texts((f'{table}#body',), seed=0)
  with pytest.raises(
    errors.UserError, match=r'row 2 of .*x\.parquet has null for `text`'
  ):
    text_sources.texts((table,), seed=0)
  with pytest.raises(
    errors.UserError, match=r'row 1 of .* no text for `n` but int .*n, text'
  ):
    text_sources.texts((f'{table}#n',), seed=0)


@pytest.mark.parametrize('suffix', ['.gz', '.zst'])
def test_a_file_that_is_cut_is_named_with_its_line(tmp_path, suffix):
  rng = random.Random(0)
  texts = [rng.randbytes(40).hex() for _ in range(3000)]
  data = ''.join(json.dumps({'text': t}) + '\n' for t in texts).encode()
  packed = text_sources.pack(data, suffix)
  path = tmp_path / f'x.jsonl{suffix}'
  path.write_bytes(packed)
  assert len(text_sources.texts((str(path),), seed=0)) == 3000
  for left in (len(packed) - 3, len(packed) // 2, 30):
    path.write_bytes(packed[:left])
    with pytest.raises(
      errors.UserError, match=r'cannot read .*x\.jsonl.* after line \d+: .*end'
    ) as caught:
      text_sources.texts((str(path),), seed=0)
    assert '\n' not in str(caught.value)
  # Frames laid end to end are whole.
  path.write_bytes(packed + text_sources.pack(b'{"text": "last"}\n', suffix))
  assert 'last' in text_sources.texts((str(path),), seed=0)


def test_a_parquet_file_that_is_cut_is_named(tmp_path):
  path = tmp_path / 'x.parquet'
  text_sources.write_parquet(path, ['one', 'two'])
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(errors.UserError, match=r'cannot read .*x\.parquet after'):
    text_sources.texts((str(path),), seed=0)


@pytest.mark.parametrize('name', ['x.jsonl', 'x.jsonl.zst', 'x.parquet'])
def test_a_big_file_is_never_in_memory(tmp_path, monkeypatch, name):
  texts = [f'{i:05}' + 'x' * 9_995 for i in range(2000)]
  path = tmp_path / name
  if name == 'x.parquet':
    text_sources.write_parquet(path, texts)
  else:
    data = ''.join(json.dumps({'text': t}) + '\n' for t in texts).encode()
    path.write_bytes(
      text_sources.pack(data, path.suffix if '.zst' in name else '')
    )
    del data
  del texts

  def peak(characters):
    monkeypatch.setattr(corpus, '_BLOCK_CHARACTERS', characters)
    files = files_lib.find(str(path), ())
    stream = corpus._in_blocks(files_lib.read(files, name), 0, 4096)
    tracemalloc.start()
    count = sum(1 for _ in stream)
    size = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000
    return size

  assert peak(2**18) < 6 * 10**6
  # And so it is the block that is held.
  assert peak(10**9) > 16 * 10**6
