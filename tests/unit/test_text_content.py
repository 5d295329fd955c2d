"""What files hold, whatever their names say: packing, encoding, limits."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import tracemalloc

import pytest
import zstandard

from sae_jax import errors
from sae_jax.text import content, corpus, files, rows
from tests.support import text_sources

TEXTS = [f'naïve text {i} ' + 'word ' * 20 for i in range(6)]
LINES = ''.join(json.dumps({'text': text}) + '\n' for text in TEXTS).encode()
MARK = b'\xef\xbb\xbf'


def windowed(log):
  """LINES as zstd with windows of 2**log bytes, which --long=LOG gives."""
  parameters = zstandard.ZstdCompressionParameters(window_log=log)
  packer = zstandard.ZstdCompressor(compression_params=parameters)
  stream = packer.compressobj()
  return stream.compress(LINES) + stream.flush()


def write(folder, name, data):
  path = folder / name
  path.write_bytes(data)
  return str(path)


def read(folder, name, data, **settings):
  """The texts of a file of these bytes."""
  return text_sources.texts((write(folder, name, data),), seed=0, **settings)


HELD = {
  'gzip.jsonl': gzip.compress(LINES),
  'zstd.jsonl': zstandard.compress(LINES),
  'plain.jsonl.gz': LINES,
  'plain.jsonl.zst': LINES,
  'zstd.jsonl.gz': zstandard.compress(LINES),
  'skipped.jsonl.zst': b'P*M\x18\x01\0\0\0x' + zstandard.compress(LINES),
  'long.jsonl.zst': windowed(28),
  'mark.jsonl': MARK + LINES,
  'marks.jsonl': MARK + LINES[: len(LINES) // 6] + MARK + LINES,
  'mark.jsonl.gz': gzip.compress(MARK + LINES),
  'crlf.jsonl': LINES.replace(b'\n', b'\r\n'),
  'cr.jsonl': LINES.replace(b'\n', b'\r'),
  'blank.jsonl': b'\n \n' + LINES.replace(b'\n', b'\n\n'),
  'whole.jsonl': LINES.rstrip(),
}


@pytest.mark.parametrize('name', HELD)
def test_the_texts_are_read_whatever_holds_them(tmp_path, name):
  assert sorted(read(tmp_path, name, HELD[name])) == TEXTS


def test_a_mark_of_byte_order_is_no_text(tmp_path):
  assert read(tmp_path, 'a.txt', MARK + b'hello') == ['hello']


NO_TEXT = {
  'mark16.txt': (
    'hé\n'.encode('utf-16'),
    'is UTF-16: .*iconv -f UTF-16 -t UTF-8',
  ),
  'wide.jsonl': (LINES.decode().encode('utf-16-le'), 'is UTF-16LE without a m'),
  'wide.txt': ('hello'.encode('utf-16-be'), 'iconv -f UTF-16BE -t UTF-8'),
  'mark32.txt': ('hello'.encode('utf-32'), 'iconv -f UTF-32 -t UTF-8'),
  'latin.txt': (
    b'caf\xe9',
    r'line 1 of .* not UTF-8 \(byte 0xe9\): .*ENCODING',
  ),
  'bzip2.jsonl': (bz2.compress(LINES), 'is compressed with bzip2: unpack it'),
  'xz.txt.gz': (lzma.compress(LINES), 'is compressed with xz: unpack it'),
  'twice.jsonl.gz': (gzip.compress(gzip.compress(LINES)), 'compressed twice'),
  'zip.txt': (b'PK\x03\x04rest', 'is a zip archive'),
  'tar.txt.gz': (gzip.compress(b'a' * 257 + b'ustar'), 'is a tar archive'),
  'lfs.txt': (b'version https://git-lfs.github.com', 'git lfs pull'),
  'lines.parquet': (LINES, r'does not begin as parquet does: .*\.jsonl'),
  'gzip.parquet': (gzip.compress(LINES), 'is compressed with gzip: unpack it'),
  'long.jsonl.zst': (windowed(29), 'window of more than 256 MiB.*--long=28'),
}


@pytest.mark.parametrize('name', NO_TEXT)
def test_what_is_no_text_is_named(tmp_path, name):
  data, message = NO_TEXT[name]
  with pytest.raises(errors.UserError, match=message) as caught:
    read(tmp_path, name, data)
  assert 'latin1' not in str(caught.value)


def test_parquet_named_otherwise_is_named(tmp_path):
  table = text_sources.write_parquet(tmp_path / 'x.parquet', ['one'])
  os.rename(table, tmp_path / 'x.jsonl')
  with pytest.raises(errors.UserError, match=r'is parquet: .*in \.parquet'):
    text_sources.texts((str(tmp_path / 'x.jsonl'),), seed=0)


def test_parquet_of_bytes_is_text(tmp_path):
  table = text_sources.write_parquet(tmp_path / 'x.parquet', [b'h\xc3\xa9'])
  assert text_sources.texts((table,), seed=0) == ['hé']
  table = text_sources.write_parquet(tmp_path / 'x.parquet', [b'a', b'\xe9'])
  with pytest.raises(errors.UserError, match=r'row 2 of .* is not UTF-8'):
    text_sources.texts((table,), seed=0)
  assert text_sources.texts((table,), seed=0, skip_bad_rows=True) == ['a']


BAD = {
  '{"text": null}': 'has null for `text`',
  '{"body": "b"}': 'has no `text`, it has body',
  '{"text": ["a"]}': r'has no text for `text` but list \(it has text\)',
  '"text"': 'is not a JSON object',
  '{"text": "half': 'is not a JSON object',
  '{"text": ' + '[' * 200_000: 'is not a JSON object',
  '{"text": "' + 'a' * 2000 + '"}': 'is longer than 1,000 characters',
}


@pytest.mark.parametrize('line', BAD, ids=range(len(BAD)))
def test_a_bad_row_is_named_or_left_out(tmp_path, monkeypatch, caplog, line):
  monkeypatch.setattr(rows, 'LONGEST', 1000 if '"a' in line else 10**6)
  data = LINES + line.encode() + b'\n' + b'{"text": "last"}\n' + b'{}\n'
  place = r'line 7 of .*a\.jsonl '
  with pytest.raises(
    errors.UserError, match=place + BAD[line] + '.*--skip_bad_rows'
  ):
    read(tmp_path, 'a.jsonl', data)
  texts = read(tmp_path, 'a.jsonl', data, skip_bad_rows=True)
  assert sorted(texts) == ['last', *TEXTS]
  assert '2 of the 9 rows of' in caplog.text


def test_a_file_without_a_good_row_is_refused(tmp_path):
  data = b'{"body": "b"}\n{"text": null}\n'
  with pytest.raises(
    errors.UserError, match=r'none of the 2 rows .*; line 1 has no `text`'
  ):
    read(tmp_path, 'a.jsonl', data, skip_bad_rows=True)


def test_lines_that_are_not_utf8_are_left_out(tmp_path):
  data = b'one\ncaf\xe9\ntwo\n'
  assert read(tmp_path, 'a.txt', data, skip_bad_rows=True) == ['one\ntwo\n']


def test_a_line_without_end_takes_little_memory(tmp_path):
  """A few KB of zstd can be gigabytes of one line."""
  packer = zstandard.ZstdCompressor().compressobj()
  block = b'a' * 2**22
  packed = packer.compress(b'{"text": "') + b''.join(
    packer.compress(block) for _ in range(24)
  )
  path = write(tmp_path, 'a.jsonl.zst', packed + packer.flush())
  assert os.path.getsize(path) < 10_000
  tracemalloc.start()
  with pytest.raises(errors.UserError, match='longer than 16,777,216 char'):
    text_sources.texts((path,), seed=0)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  # Less than the line, which is 96 MiB.
  assert peak < 56 * 2**20


def test_excerpts_of_a_block_are_held_not_its_texts(tmp_path):
  texts = [f'{i:03}' + 'x' * 100_000 for i in range(60)]
  path = text_sources.write_jsonl(tmp_path / 'a.jsonl', texts)
  # Control: whole texts are held where whole texts are wanted.
  for characters, below in ((1000, True), (None, False)):
    tracemalloc.start()
    next(corpus.documents((path,), 0, characters))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (peak < 3_000_000) == below


def test_a_file_of_sentences_is_cut_at_lines(tmp_path):
  sentences = [f'Sentence {i} says little.\n' for i in range(3000)]
  texts = read(tmp_path, 'a.txt', ''.join(sentences).encode())
  assert len(texts) == 20
  assert max(map(len, texts)) < 4100
  assert all(text.endswith('\n') for text in texts)
  assert sorted(''.join(texts).splitlines(True)) == sorted(sentences)
  # Finer where a document may give less, so that little is lost.
  path = str(tmp_path / 'a.txt')
  texts = text_sources.texts((path,), seed=0, max_characters=512)
  assert sum(map(len, texts)) > 0.95 * len(''.join(sentences))


def test_a_text_without_lines_is_cut_at_white_space(tmp_path):
  texts = read(tmp_path, 'a.txt', b'abcdef ' * 10_000)
  assert {len(text) % 7 for text in texts} == {0}
  assert all(5900 < len(text) <= 8000 for text in texts[:-1])
  texts = read(
    tmp_path,
    'a.txt',
    ''.join(map(chr, range(0x3400, 0x3400 + 30_000))).encode(),
  )
  assert sorted(map(len, texts)) == [6000, 8000, 8000, 8000]


STORIES = [f'Once {i}, a fox.\n\nIt ran.' + ' far' * 700 for i in range(9)]


@pytest.mark.parametrize('join', ['\n<|endoftext|>\n', '<|endoftext|>', '\n{}'])
def test_stories_are_what_is_between_separators(tmp_path, join):
  join = join.replace('{}', '<|endoftext|>\r\n\r\n')
  texts = read(tmp_path, 'a.txt', join.join(STORIES).encode())
  assert sorted(texts) == STORIES
  # Control: another mark separates nothing.
  texts = read(
    tmp_path, 'a.txt', join.replace('end', 'no').join(STORIES).encode()
  )
  assert sorted(texts) != STORIES


def test_json_named_as_text_is_pointed_out(tmp_path, caplog):
  read(tmp_path, 'a.txt', gzip.compress(LINES))
  assert r'looks like JSON' in caplog.text
  caplog.clear()
  read(tmp_path, 'a.txt', b'{braces} of prose')
  assert not caplog.text


def test_folders_with_brackets_are_found(tmp_path):
  (tmp_path / 'run[1]').mkdir()
  path = write(tmp_path / 'run[1]', 'a[2].jsonl', LINES)
  folder = str(tmp_path / 'run[1]')
  for source in (path, folder, folder + '/*.jsonl', folder + '/a[[]2].jsonl'):
    assert len(text_sources.texts((source,), seed=0)) == 6
  with pytest.raises(errors.UserError, match='holds none of the files'):
    corpus.documents((folder + '/b[2].jsonl',), seed=0)


def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch):
  path = tmp_path / 'a.txt'
  os.mkfifo(path)
  with pytest.raises(errors.UserError, match='no ordinary file: check'):
    text_sources.texts((str(path),), seed=0)
  with pytest.raises(errors.UserError, match="source '' names no file"):
    corpus.documents(('',), seed=0)

  def forbidden():
    raise PermissionError(13, 'Permission denied')

  with pytest.raises(
    errors.UserError, match=r'cannot open b\.txt: .*Permission denied: check'
  ):
    next(rows.read(forbidden, 'b.txt', '.txt', 'text'))

  class Broken(io.BytesIO):
    def read(self, size=-1):
      raise OSError(5, 'Input/output error')

  with pytest.raises(errors.UserError, match=r'after line 0: .*check the disk'):
    next(rows.read(Broken, 'b.txt', '.txt', 'text'))


def test_what_vanishes_is_named(tmp_path):
  path = write(tmp_path, 'a.jsonl', LINES)
  found = files.find(path, ())
  os.unlink(path)
  with pytest.raises(errors.UserError, match=r'cannot open .*a\.jsonl'):
    next(files.read(found, 'a.jsonl'))


def test_zstd_is_read_in_pieces():
  """Frames, small and large, end to end."""
  frames = [b'', b'a', b'b' * 300_000, *[b'c'] * 500]
  data = b''.join(map(zstandard.compress, frames))
  assert content.of(io.BytesIO(data), 'x').read() == b''.join(frames)
  with pytest.raises(EOFError):
    content.of(io.BytesIO(data[:-1]), 'x').read()
  blocks = itertools.chain([b'ab'], [b'c'])
  assert content._buffered(blocks).read() == b'abc'
