"""Text files, and the documents read from them."""

import gzip
import json

import pyarrow as pa
from pyarrow import parquet
import zstandard

from sae_jax.text import corpus


def texts(*args, **kwargs):
  return [document.text for document in corpus.documents(*args, **kwargs)]


def write_jsonl(path, texts):
  path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  return str(path)


def pack(data, suffix):
  if suffix == '.gz':
    return gzip.compress(data)
  return zstandard.ZstdCompressor().compress(data) if suffix else data


def write_parquet(path, texts, column='text'):
  table = pa.table({'n': range(len(texts)), column: pa.array(texts)})
  parquet.write_table(table, path, row_group_size=100)
  return str(path)


def write_folder(folder):
  (folder / 'deep').mkdir(parents=True)
  (folder / '.hidden').mkdir()
  lines, rows = [[f'{name} {i}' for i in range(40)] for name in ('one', 'two')]
  write_jsonl(folder / 'one.jsonl', lines)
  write_parquet(folder / 'deep' / 'two.parquet', rows)
  (folder / 'deep' / 'three.txt.gz').write_bytes(gzip.compress(b'three'))
  write_jsonl(folder / '_marks.jsonl', ['never'])
  write_jsonl(folder / '.hidden' / 'x.jsonl', ['never'])
  (folder / 'notes.md').write_text('never')
  return lines, rows
