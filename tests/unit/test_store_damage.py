"""Stores that are damaged, edited or cannot be written: named in one line."""

import json
import shutil

import numpy as np
import pytest

from sae_jax import errors, store
from sae_jax.storage import signed
from sae_jax.store import layout, manifest
from sae_jax.store import writer as writer_lib
from sae_jax.store.manifest import StorePlan
from tests.support import small


def test_a_damaged_chunk_does_not_read(tmp_path):
  small.write(str(tmp_path), small.data())
  shard = tmp_path / 'activations' / small.SITES[0] / 'c' / '1' / '0'
  damaged = bytearray(shard.read_bytes())
  damaged[5] ^= 1
  shard.write_bytes(damaged)
  opened = store.open_store(str(tmp_path))
  first = opened.starts[1]
  opened.read_rows(0, first)
  with pytest.raises(errors.UserError, match='cannot read activations/'):
    opened.read_rows(first, first + 1)
  with pytest.raises(errors.UserError, match=r'1 objects .*/c/1/0 cannot read'):
    opened.verify()


@pytest.mark.parametrize('name', ['activations', 'tokens', 'stream_index'])
def test_verify_finds_another_store_s_data(tmp_path, name):
  data = small.data()
  # As many tokens are kept of each context, but others.
  keep = np.concatenate(
    [np.sort(part) for part in np.split(data['keep_mask'], range(16, 150, 16))]
  )
  assert (keep != data['keep_mask']).any()
  other = data | {'tokens': small.flip(data['tokens']), 'keep_mask': keep}
  other['kept'] = small.flip(data['kept'])
  small.write(str(tmp_path / 'a'), data)
  small.write(str(tmp_path / 'b'), other)
  shutil.rmtree(tmp_path / 'a' / name)
  shutil.copytree(tmp_path / 'b' / name, tmp_path / 'a' / name)
  opened = store.open_store(str(tmp_path / 'a'))
  opened.read_rows(0, opened.manifest.n_rows)
  with pytest.raises(
    errors.UserError, match=f'{name}.*c/[0-9].* is not what was written'
  ):
    opened.verify()
  store.open_store(str(tmp_path / 'b')).verify()


def edit(path, sign=True, **changes):
  """Changes fields of a store's file, and its digests so that they agree."""
  content = json.loads(path.read_text()) | changes
  content.pop('sha256', None)
  if 'identity' in content:
    content['identity'] = manifest.identity(content)
  if sign:
    content['sha256'] = signed.digest(content)
  path.write_text(json.dumps(content))


def test_an_edited_manifest_is_named_on_opening(tmp_path):
  small.write(str(tmp_path), small.data())
  path = tmp_path / 'manifest.json'
  text = path.read_text()
  for old, new in (
    ('"holdout_rows": 11', '"holdout_rows": 13'),
    ('"sae_jax": "0"', '"sae_jax": "1"'),
  ):
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(errors.UserError, match=r'manifest\.json in .* edited'):
      store.open_store(str(tmp_path))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'format_version': 9}, 'format version 9, this sae_jax reads version 3'),
    ({'colour': 'red'}, 'no field colour'),
    ({'dtype': 'object'}, "dtype 'object' cannot be stored"),
    ({'d_model': 2**40}, 'a chunk of 8 rows of width 1099511627776'),
    ({'d_model': 0}, 'a chunk of 8 rows of width 0'),
    ({'shard_rows': 2**40}, 'shard_rows 1099511627776 must be from 1'),
    ({'chunk_rows': 0}, 'multiple of chunk_rows 0'),
    ({'context_length': 2**40}, 'context_length 1099511627776 must be'),
    ({'sites': ['../x']}, r"file '\.\./x', which is no plain file name"),
    ({'sites': []}, 'holds text alone, no activations'),
    ({'version': 2}, 'says version 2, not 1'),
    ({'n_rows': 9}, 'says n_rows 9, not'),
    ({'n_stream': 9}, 'says n_stream 9, not 150'),
    ({'holdout_rows': -1}, 'says holdout_rows -1 of'),
    ({'holdout_rows': 999}, 'says holdout_rows 999 of'),
    ({'shard_counts': [[40, 40]]}, '40 rows of 40 tokens in a shard, the 1.'),
    ({'shard_counts': [[2, 'x']]}, "shard_counts is 'x', not of the type int"),
    ({'checksums': {}}, '0 checksums of activations/'),
  ],
)
def test_a_manifest_that_is_not_of_one_store_is_refused(
  tmp_path, change, message
):
  small.write(str(tmp_path), small.data())
  edit(tmp_path / 'manifest.json', **change)
  with pytest.raises(errors.UserError, match=message):
    store.open_store(str(tmp_path))


def test_every_small_file_is_vouched_for(tmp_path):
  begun = tmp_path / 'begun'
  small.begin(str(begun), small.data(), 2)
  for name, old, new in (
    ('plan.json', '"seed": 0', '"seed": 1'),
    ('shards/000000.json', '"contexts": 2', '"contexts": 3'),
  ):
    path = begun / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(errors.UserError, match=f'{name} in .* was edited'):
      store.open_store(str(begun), unsealed=True)
    path.write_text(text)
  edit(begun / 'shards' / '000000.json', rows=3)
  with pytest.raises(errors.UserError, match='says rows 3, its documents have'):
    store.open_store(str(begun), unsealed=True)


def test_stores_without_digests_open_and_go_on(tmp_path):
  # As they were written before files had digests of their own.
  small.begin(str(tmp_path), small.data(), 2)
  for name in ('plan.json', 'shards/000000.json', 'shards/000001.json'):
    edit(tmp_path / name, sign=False)
  small.write(str(tmp_path), small.data())
  edit(tmp_path / 'manifest.json', sign=False)
  opened = store.open_store(str(tmp_path))
  opened.verify()
  other = str(tmp_path / 'other')
  assert small.write(other, small.data()).identity == opened.manifest.identity


def test_a_record_that_the_manifest_does_not_know_is_not_sealed_again(tmp_path):
  small.write(str(tmp_path), small.data())
  edit(tmp_path / 'shards' / '000001.json', source_rows={'text': 1})
  with pytest.raises(errors.UserError, match=r'1 objects .*/000001\.json'):
    store.open_store(str(tmp_path)).verify()
  writer = writer_lib.StoreWriter(str(tmp_path), StorePlan(**small.PLAN))
  with pytest.raises(errors.UserError, match=r'shards/000001\.json .* is not'):
    writer.seal(writer.complete(4))


def test_metadata_is_for_other_readers_and_verified(tmp_path):
  data = small.data()
  small.write(str(tmp_path), data)
  path = tmp_path / 'tokens' / 'zarr.json'
  content = json.loads(path.read_text())
  for text in (
    '[' * 200_000,
    json.dumps(content | {'shape': [1]}),
    json.dumps(content | {'data_type': 'int64'}),
    json.dumps(content | {'fill_value': 1}),
    '',
  ):
    path.write_text(text)
    opened = store.open_store(str(tmp_path))
    np.testing.assert_array_equal(opened.tokens(), data['tokens'])
    with pytest.raises(errors.UserError, match=r'1 objects .* tokens/zarr\.j'):
      opened.verify()


def test_a_manifest_that_is_not_json_is_refused(tmp_path):
  (tmp_path / 'manifest.json').write_text('{')
  with pytest.raises(errors.UserError, match=r'manifest\.json in .* damaged'):
    store.open_store(str(tmp_path))


def test_a_missing_array_is_named(tmp_path):
  small.write(str(tmp_path), small.data())
  shutil.rmtree(tmp_path / 'documents')
  opened = store.open_store(str(tmp_path))
  with pytest.raises(errors.UserError, match='cannot read documents of store'):
    opened.documents()


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.UserError, match='cannot write store') as caught:
    small.begin(str(tmp_path / 'file' / 'store'), small.data())
  assert '\n' not in str(caught.value)
  assert 'tensorstore_spec' not in str(caught.value)


def test_a_disk_that_fails_midway(tmp_path):
  folder = tmp_path / 'store'
  small.begin(str(folder), small.data(), 1)
  shutil.rmtree(folder / 'activations')
  (folder / 'activations').write_text('in the way')
  (folder / 'shards' / '000000.json').unlink()
  with pytest.raises(errors.UserError, match='cannot write store'):
    small.begin(str(folder), small.data(), 1)
  assert layout.read_manifest(str(folder)) is None
  # With the obstacle gone it goes on.
  (folder / 'activations').unlink()
  small.write(str(folder), small.data())
  store.open_store(str(folder)).verify()


def test_a_lost_shard_does_not_pass_for_zeros(tmp_path):
  small.write(str(tmp_path), small.data())
  lost = tmp_path / 'activations' / small.SITES[0] / 'c' / '1' / '0'
  assert lost.exists()
  lost.unlink()
  opened = store.open_store(str(tmp_path))
  with pytest.raises(errors.UserError, match=r'is missing.*harvest it again'):
    opened.read_rows(0, opened.manifest.n_rows)
