"""The store: round trips, splits of appends, damage, leftovers, gs://."""

import dataclasses
import itertools
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from sae_jax import config
from sae_jax.activations import layout, store
from tests import fake_gcs

pytestmark = pytest.mark.fast

D, CHUNK, SHARD = 6, 8, 32
FIELDS = {
  'subject': 'toy',
  'weights_sha256': 'ab',
  'site': 'blocks.1.resid_post',
  'holdout_rows': 11,
  'context_length': 16,
  'sources': ('text',),
  'source_rows': {'text': 1},
  'seed': 0,
  'mask': {'rule': 'none'},
  'config': {'sources': ('text',)},
  'software': {'sae_jax': '0'},
}


def _data(n_stream=150, seed=0):
  """A stream of 150 tokens that keeps most: some 110 rows, 4 shards."""
  rng = np.random.default_rng(seed)
  keep = rng.random(n_stream) < 0.75
  return {
    'tokens': rng.integers(0, 500, n_stream),
    'documents': np.sort(rng.integers(0, 9, n_stream)),
    'positions': np.arange(n_stream) % 16,
    'keep_mask': keep,
    'resid_kept': rng.normal(size=(keep.sum(), D)).astype(np.float32),
  }


def _write(url, data, dtype='float32', cuts=(), finish=True, **fields):
  with store.StoreWriter(url, D, dtype, CHUNK, SHARD) as writer:
    edges = [0, *cuts, len(data['tokens'])]
    row = 0
    for start, stop in itertools.pairwise(edges):
      part = {k: v[start:stop] for k, v in data.items() if k != 'resid_kept'}
      rows = part['keep_mask'].sum()
      writer.append(**part, resid_kept=data['resid_kept'][row : row + rows])
      row += rows
    assert writer.n_rows == len(data['resid_kept'])
    assert writer.n_stream == len(data['tokens'])
    return writer.finish(**(FIELDS | fields)) if finish else None


def _files(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_what_was_written_is_read(tmp_path, dtype):
  data = _data()
  manifest = _write(str(tmp_path), data, dtype, cuts=(3, 4, 90))
  opened = store.open_store(str(tmp_path))
  assert opened.manifest == manifest
  for name in ('tokens', 'documents', 'positions'):
    got = getattr(opened, name)()
    np.testing.assert_array_equal(got, data[name])
    assert got.dtype == np.int32
  index = opened.stream_index()
  np.testing.assert_array_equal(index, np.flatnonzero(data['keep_mask']))
  assert index.dtype == np.int64
  resid, n = data['resid_kept'], len(data['resid_kept'])
  if dtype == 'bfloat16':
    rounded = resid.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert not np.array_equal(rounded, resid)
    resid = rounded
  assert (manifest.n_rows, manifest.n_stream) == (n, 150)
  assert opened.n_train == n - 11
  for start, stop in ((0, n), (0, 0), (7, 9), (31, 33), (n - 1, n)):
    got = opened.read_rows(start, stop)
    np.testing.assert_array_equal(got, resid[start:stop])
    assert got.dtype == np.float32
  rows = np.random.default_rng(1).integers(0, n, 50)
  np.testing.assert_array_equal(opened.gather(rows), resid[rows])
  assert opened.gather([]).shape == (0, D)
  opened.verify()


def test_the_layout_is_sharded_zarr(tmp_path):
  _write(str(tmp_path), _data(), 'bfloat16')
  meta = json.loads((tmp_path / 'activations' / 'zarr.json').read_text())
  n = store.open_store(str(tmp_path)).manifest.n_rows
  assert meta['shape'] == [n, D]
  assert meta['data_type'] == 'bfloat16'
  assert meta['chunk_grid']['configuration']['chunk_shape'] == [SHARD, D]
  (codec,) = meta['codecs']
  assert codec['name'] == 'sharding_indexed'
  assert codec['configuration']['chunk_shape'] == [CHUNK, D]
  shards = list((tmp_path / 'activations' / 'c').glob('*/0'))
  assert len(shards) == -(-n // SHARD)


def test_how_appends_are_cut_changes_nothing(tmp_path):
  data = _data()
  whole = _write(str(tmp_path / 'whole'), data)
  cuts = tuple(range(1, 150, 7))
  assert _write(str(tmp_path / 'cut'), data, cuts=cuts) == whole
  assert _files(tmp_path / 'cut') == _files(tmp_path / 'whole')


def _flip(array):
  array = array.copy()
  array.reshape(-1)[-1] += 1
  return array


def test_identity_names_data_and_config(tmp_path):
  data = _data()
  url = str(tmp_path / 'store')
  first = _write(url, data)
  assert _write(url, data).identity == first.identity
  assert _write(url, data, software={'jax': '9'}).identity == first.identity
  others = [_write(url, data, 'bfloat16').identity]
  for name in ('tokens', 'documents', 'positions', 'resid_kept'):
    others.append(_write(url, data | {name: _flip(data[name])}).identity)
  moved = data | {'keep_mask': np.roll(data['keep_mask'], 1)}
  others.append(_write(url, moved).identity)
  for name in FIELDS.keys() - {'software'}:
    changed = {'sources': ('other',)}.get(name, 'other')
    others.append(_write(url, data, **{name: changed}).identity)
  assert len({first.identity, *others}) == 1 + len(others)


def test_an_unfinished_store_is_refused_and_started_over(tmp_path):
  url = str(tmp_path / 'store')
  longer = _data(400, seed=1)
  _write(url, longer, finish=False)
  assert (tmp_path / 'store' / 'activations' / 'zarr.json').exists()
  with pytest.raises(config.UserError, match='not a finished store'):
    store.open_store(url)
  _write(url, _data())
  clean = tmp_path / 'clean'
  _write(str(clean), _data())
  assert _files(tmp_path / 'store') == _files(clean)
  assert len(_files(clean)) > 6


def test_a_writer_that_fails_leaves_no_manifest_of_an_earlier_store(tmp_path):
  url = str(tmp_path)
  _write(url, _data())
  assert layout.read_manifest(url) is not None
  _write(url, _data(seed=1), finish=False)
  assert layout.read_manifest(url) is None


def test_only_the_store_is_deleted(tmp_path):
  (tmp_path / 'notes.txt').write_text('mine')
  _write(str(tmp_path), _data())
  _write(str(tmp_path), _data())
  assert (tmp_path / 'notes.txt').read_text() == 'mine'


def test_a_damaged_chunk_does_not_read(tmp_path):
  _write(str(tmp_path), _data())
  shard = tmp_path / 'activations' / 'c' / '1' / '0'
  damaged = bytearray(shard.read_bytes())
  damaged[5] ^= 1
  shard.write_bytes(damaged)
  opened = store.open_store(str(tmp_path))
  opened.read_rows(0, SHARD)
  with pytest.raises(config.UserError, match='cannot read an array'):
    opened.read_rows(SHARD, SHARD + 1)
  with pytest.raises(config.UserError, match='cannot read'):
    opened.verify()


@pytest.mark.parametrize('name', ['activations', 'tokens', 'stream_index'])
def test_verify_finds_another_store_s_data(tmp_path, name):
  data = _data()
  keep = np.zeros(150, bool)
  keep[: len(data['resid_kept'])] = True
  other = data | {'tokens': _flip(data['tokens']), 'keep_mask': keep}
  other['resid_kept'] = _flip(data['resid_kept'])
  _write(str(tmp_path / 'a'), data)
  _write(str(tmp_path / 'b'), other)
  shutil.rmtree(tmp_path / 'a' / name)
  shutil.copytree(tmp_path / 'b' / name, tmp_path / 'a' / name)
  opened = store.open_store(str(tmp_path / 'a'))
  opened.read_rows(0, opened.manifest.n_rows)
  with pytest.raises(config.UserError, match=f'{name} of store .* is not what'):
    opened.verify()
  store.open_store(str(tmp_path / 'b')).verify()


def test_verify_finds_an_edited_manifest(tmp_path):
  manifest = _write(str(tmp_path), _data())
  path = tmp_path / 'manifest.json'
  edited = dataclasses.replace(manifest, site='blocks.2.resid_post')
  path.write_text(config.to_json(edited))
  with pytest.raises(config.UserError, match='was edited'):
    store.open_store(str(tmp_path)).verify()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'n_rows': 5}, r'activations .* its manifest says float32 \(5, 6\)'),
    ({'dtype': 'bfloat16'}, 'manifest says bfloat16'),
    ({'format_version': 9}, 'format version 9, this sae_jax reads version 1'),
    ({'colour': 'red'}, 'no field colour'),
  ],
)
def test_a_manifest_that_does_not_fit_is_refused(tmp_path, change, message):
  _write(str(tmp_path), _data())
  path = tmp_path / 'manifest.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(config.UserError, match=message):
    store.open_store(str(tmp_path))


def test_a_manifest_that_is_not_json_is_refused(tmp_path):
  (tmp_path / 'manifest.json').write_text('{')
  with pytest.raises(config.UserError, match=r'cannot read manifest\.json'):
    store.open_store(str(tmp_path))


def test_a_missing_array_is_named(tmp_path):
  _write(str(tmp_path), _data())
  shutil.rmtree(tmp_path / 'documents')
  opened = store.open_store(str(tmp_path))
  with pytest.raises(config.UserError, match='cannot read documents of store'):
    opened.documents()


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(config.UserError, match='cannot write store') as caught:
    store.StoreWriter(str(tmp_path / 'file' / 'store'), D)
  assert '\n' not in str(caught.value)
  assert 'tensorstore_spec' not in str(caught.value)


def test_a_disk_that_fails_midway(tmp_path, monkeypatch):
  url = str(tmp_path / 'store')
  with store.StoreWriter(url, D, 'float32', CHUNK, SHARD) as writer:
    shutil.rmtree(tmp_path / 'store' / 'activations')
    (tmp_path / 'store' / 'activations').write_text('in the way')
    with pytest.raises(config.UserError, match='cannot write store'):
      data = _data(400)
      writer.append(**data)
      writer.finish(**FIELDS)
  assert layout.read_manifest(url) is None


def test_sizes_that_do_not_fit(tmp_path):
  with pytest.raises(config.UserError, match='shard_rows 100 must be a mult'):
    store.StoreWriter(str(tmp_path), D, 'float32', 64, 100)
  with pytest.raises(config.UserError, match="dtype 'int8' cannot be stored"):
    store.StoreWriter(str(tmp_path), D, 'int8')
  data = _data()
  with store.StoreWriter(str(tmp_path), D, 'float32', CHUNK, SHARD) as writer:
    with pytest.raises(ValueError, match='keep_mask keeps'):
      writer.append(**(data | {'resid_kept': data['resid_kept'][1:]}))
    with pytest.raises(ValueError, match='differ in size'):
      writer.append(**(data | {'tokens': data['tokens'][1:]}))


def test_rows_beyond_the_store(tmp_path):
  n = _write(str(tmp_path), _data()).n_rows
  opened = store.open_store(str(tmp_path))
  for start, stop in ((-1, 2), (0, n + 1), (5, 4)):
    with pytest.raises(IndexError):
      opened.read_rows(start, stop)
  for row in (-1, n):
    with pytest.raises(IndexError):
      opened.gather([0, row])


@pytest.fixture
def bucket(monkeypatch):
  """A server of gs://bucket; TensorStore reads the variables as it connects."""
  server = fake_gcs.FakeGcs(['bucket'])
  with server as url:
    monkeypatch.setenv('TENSORSTORE_GCS_HTTP_URL', url)
    monkeypatch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'fake')
    yield server.objects['bucket']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_bucket_holds_the_same_bytes_as_a_folder(tmp_path, bucket, dtype):
  data = _data()
  local = _write(str(tmp_path), data, dtype)
  assert _write('gs://bucket/deep/store/', data, dtype) == local
  objects = {
    name.removeprefix('deep/store/'): o.data for name, o in bucket.items()
  }
  assert objects == _files(tmp_path)
  remote = store.open_store('gs://bucket/deep/store')
  here = store.open_store(str(tmp_path))
  np.testing.assert_array_equal(
    remote.read_rows(0, local.n_rows), here.read_rows(0, local.n_rows)
  )
  rows = [100, 3, 64]
  np.testing.assert_array_equal(remote.gather(rows), here.gather(rows))
  np.testing.assert_array_equal(remote.stream_index(), here.stream_index())
  remote.verify()


def test_an_unfinished_store_in_a_bucket_is_started_over(bucket):
  url = 'gs://bucket/store'
  _write(url, _data(400, seed=1), finish=False)
  with pytest.raises(config.UserError, match='not a finished store'):
    store.open_store(url)
  _write(url, _data())
  names = set(bucket)
  bucket.clear()
  _write(url, _data())
  assert set(bucket) == names
  # The manifest is the last object a harvest writes.
  newest = max(bucket, key=lambda name: bucket[name].generation)
  assert newest == 'store/manifest.json'


def test_a_bucket_that_is_not_there(bucket):
  with pytest.raises(config.UserError, match='cannot write store gs://nobody'):
    _write('gs://nobody/store', _data())


def test_a_lost_shard_does_not_pass_for_zeros(tmp_path):
  _write(str(tmp_path), _data())
  lost = tmp_path / 'activations' / 'c' / '1' / '0'
  assert lost.exists()
  lost.unlink()
  opened = store.open_store(str(tmp_path))
  with pytest.raises(config.UserError, match=r'is missing.*harvest it again'):
    opened.read_rows(0, opened.manifest.n_rows)


def test_zeros_are_stored_and_read(tmp_path):
  data = _data()
  data = {k: v if k == 'keep_mask' else v * 0 for k, v in data.items()}
  _write(str(tmp_path), data)
  opened = store.open_store(str(tmp_path))
  assert not opened.read_rows(0, opened.manifest.n_rows).any()
  assert not opened.tokens().any()
