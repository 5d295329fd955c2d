"""The store: round trips, splits of appends, damage, leftovers, gs://."""

import dataclasses
import itertools
import json
import shutil
import threading

import ml_dtypes
import numpy as np
import pytest

from sae_jax import config
from sae_jax.activations import layout, store
from sae_jax.activations import writer as writer_lib
from sae_jax.activations.manifest import Plan
from tests import fake_gcs

pytestmark = pytest.mark.fast

D, CHUNK, SHARD = 6, 8, 32
SITES = ('blocks.1.resid_post', 'blocks.0.mlp_out')
PLAN = {
  'subject': 'toy',
  'sites': SITES[:1],
  'd_model': D,
  'weights_sha256': 'ab',
  'chunk_rows': CHUNK,
  'shard_rows': SHARD,
  'context_length': 16,
  'sources': ('text',),
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
    'kept': rng.normal(size=(keep.sum(), D)).astype(np.float32),
  }


def _stretches(data, cuts, sites=SITES[:1]):
  """The arguments of `append` for each context, or each stretch of cuts."""
  edges = [0, *(cuts or range(16, len(data['tokens']), 16))]
  row = 0
  for start, stop in itertools.pairwise([*edges, len(data['tokens'])]):
    part = [v[start:stop] for k, v in data.items() if k != 'kept']
    kept = data['kept'][row : row + part[-1].sum()]
    row += len(kept)
    yield *part, {site: kept + i for i, site in enumerate(sites)}


def _write(url, data, cuts=(), holdout_rows=11, mask=None, **plan):
  made = Plan(**(PLAN | plan))
  return writer_lib.write(
    url,
    made,
    _stretches(data, cuts, made.sites),
    holdout_rows=holdout_rows,
    mask=mask or {'rule': 'none'},
  )


def _begin(url, data, n_shards=1, **plan):
  """The first shards alone, as an interrupted writer leaves them."""
  writer = writer_lib.StoreWriter(url, Plan(**(PLAN | plan)))
  stretches = list(_stretches(data, ()))
  for number in range(n_shards):
    shard = writer.shard(number)
    while stretches and shard.has_room(
      len(stretches[0][0]), stretches[0][3].sum()
    ):
      shard.append(*stretches.pop(0))
    shard.finish()
  return writer


def _files(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_what_was_written_is_read(tmp_path, dtype):
  data = _data()
  manifest = _write(
    str(tmp_path), data, dtype=dtype, cuts=(3, 4, 30, 70, 90, 120)
  )
  opened = store.open_store(str(tmp_path))
  assert opened.manifest == manifest
  for name in ('tokens', 'documents', 'positions'):
    got = getattr(opened, name)()
    np.testing.assert_array_equal(got, data[name])
    assert got.dtype == np.int32
  index = opened.stream_index()
  np.testing.assert_array_equal(index, np.flatnonzero(data['keep_mask']))
  assert index.dtype == np.int64
  resid, n = data['kept'], len(data['kept'])
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
  _write(str(tmp_path), _data(), dtype='bfloat16')
  folder = tmp_path / 'activations' / SITES[0]
  meta = json.loads((folder / 'zarr.json').read_text())
  counts = store.open_store(str(tmp_path)).manifest.shard_counts
  assert meta['shape'] == [len(counts) * SHARD, D]
  assert meta['data_type'] == 'bfloat16'
  assert meta['chunk_grid']['configuration']['chunk_shape'] == [SHARD, D]
  (codec,) = meta['codecs']
  assert codec['name'] == 'sharding_indexed'
  assert codec['configuration']['chunk_shape'] == [CHUNK, D]
  assert len(list((folder / 'c').glob('*/0'))) == len(counts)
  # A shard ends with a context, so few are full.
  assert {rows < SHARD for rows, _ in counts} == {True}


def test_zarr_reads_it_without_this_library(tmp_path):
  zarr = pytest.importorskip('zarr')
  data = _data()
  manifest = _write(str(tmp_path), data)
  group = zarr.open(str(tmp_path / 'activations' / SITES[0]), mode='r')
  rows = [
    group[i * SHARD : i * SHARD + n]
    for i, (n, _) in enumerate(manifest.shard_counts)
  ]
  np.testing.assert_array_equal(np.concatenate(rows), data['kept'])
  tokens = zarr.open(str(tmp_path / 'tokens'), mode='r')
  parts = [
    tokens[2 * i * SHARD :][:n]
    for i, (_, n) in enumerate(manifest.shard_counts)
  ]
  np.testing.assert_array_equal(np.concatenate(parts), data['tokens'])


def test_several_sites_share_a_stream(tmp_path):
  data = _data()
  _write(str(tmp_path), data, sites=SITES)
  with pytest.raises(config.UserError, match='name one of them as the site'):
    store.open_store(str(tmp_path))
  with pytest.raises(config.UserError, match=r'not blocks\.7\.resid_post'):
    store.open_store(str(tmp_path), 'blocks.7.resid_post')
  for i, site in enumerate(SITES):
    opened = store.open_store(str(tmp_path), site)
    assert opened.site == site
    np.testing.assert_array_equal(
      opened.read_rows(0, len(data['kept'])), data['kept'] + np.float32(i)
    )
    opened.verify()


def _flip(array):
  array = array.copy()
  array.reshape(-1)[-1] += 1
  return array


def test_identity_names_data_and_config(tmp_path):
  data, numbers = _data(), itertools.count()

  def made(data, **fields):
    return _write(str(tmp_path / str(next(numbers))), data, **fields).identity

  first = made(data)
  assert made(data) == first
  assert made(data, software={'jax': '9'}) == first
  others = [made(data, dtype='bfloat16')]
  for name in ('tokens', 'documents', 'positions', 'kept'):
    others.append(made(data | {name: _flip(data[name])}))
  moved = data | {'keep_mask': np.roll(data['keep_mask'], 1)}
  others.append(made(moved))
  changes = {
    'subject': 'other', 'weights_sha256': 'other', 'context_length': 17,
    'sources': ('other',), 'seed': 1, 'config': {}, 'sites': SITES[1:],
    'holdout_rows': 12, 'mask': {'rule': 'other'}, 'chunk_rows': 16,
  }  # fmt: skip
  for name, value in changes.items():
    others.append(made(data, **{name: value}))
  assert len({first, *others}) == 1 + len(others)


def test_an_unfinished_store_is_refused_and_goes_on(tmp_path):
  url = str(tmp_path / 'store')
  _begin(url, _data(), 2)
  with pytest.raises(config.UserError, match='not a finished store'):
    store.open_store(url)
  # Asked for, what is complete can be read.
  some = store.open_store(url, unsealed=True)
  assert len(some.manifest.shard_counts) == 2 and some.n_train > SHARD
  np.testing.assert_array_equal(
    some.read_rows(0, some.n_train), _data()['kept'][: some.n_train]
  )
  # Its shards stay as they are.
  before = _files(tmp_path / 'store')
  _write(url, _data())
  after = _files(tmp_path / 'store')
  assert {name: after[name] for name in before} == before
  _write(str(tmp_path / 'clean'), _data())
  assert after == _files(tmp_path / 'clean')
  assert len(after) > 6


def test_of_two_writers_the_first_stays_whole_and_the_other_is_told(tmp_path):
  url = str(tmp_path / 'store')
  first = _begin(url, _data())
  before = _files(tmp_path / 'store')
  # The same bytes are the same work.
  _begin(url, _data())
  assert _files(tmp_path / 'store') == before
  with pytest.raises(config.UserError, match=r'c/0/0 of store .* other bytes'):
    _begin(url, _data(seed=1))
  assert _files(tmp_path / 'store') == before
  # Also if the first one is not done yet: what it wrote stays.
  (tmp_path / 'store' / 'shards' / '000000.json').unlink()
  assert not first.records()
  with pytest.raises(config.UserError, match='another harvest is writing'):
    _begin(url, _data(seed=1))
  _begin(url, _data())
  assert _files(tmp_path / 'store') == before


def test_two_writers_at_once_leave_one_whole_shard(tmp_path):
  url = str(tmp_path / 'store')
  told, barrier = [], threading.Barrier(2)

  def work(seed):
    barrier.wait()
    try:
      _begin(url, _data(seed=seed))
    except config.UserError as error:
      told.append(str(error))

  threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(told) == 1 and 'other bytes' in told[0]
  some = store.open_store(url, unsealed=True)
  found = some.read_rows(0, some.n_train)
  assert (
    sum(
      np.array_equal(found, _data(seed=seed)['kept'][: some.n_train])
      for seed in (0, 1)
    )
    == 1
  )
  some.tokens()


def test_another_plan_is_refused(tmp_path):
  _begin(str(tmp_path), _data())
  with pytest.raises(
    config.UserError, match=r"another plan \(dtype: 'float32'"
  ):
    _begin(str(tmp_path), _data(), dtype='bfloat16')
  _begin(str(tmp_path), _data(), software={'jax': 'newer'})


def test_appending_makes_a_version_and_leaves_the_first(tmp_path):
  url, data = str(tmp_path), _data()
  first = _write(url, data)
  before = _files(tmp_path)
  writer = writer_lib.StoreWriter(url, Plan(**PLAN))
  more = _data(seed=1)
  shard = writer.shard(len(first.shard_counts))
  shard.append(*next(_stretches(more, ())))
  shard.finish()
  second = writer.seal(
    writer.complete(len(first.shard_counts) + 1), holdout_rows=3
  )
  assert (first.version, second.version) == (1, 2)
  assert second.n_rows == first.n_rows + shard.rows
  assert second.identity != first.identity
  assert store.open_store(url).manifest == second
  old = store.open_store(url, version=1)
  assert old.manifest == first
  np.testing.assert_array_equal(old.read_rows(0, first.n_rows), data['kept'])
  old.verify()
  after = _files(tmp_path)
  changed = {name for name in before if after[name] != before[name]}
  assert {name.split('/')[-1] for name in changed} == {'zarr.json'}
  with pytest.raises(config.UserError, match='not version 3 of a finished'):
    store.open_store(url, version=3)


def test_a_damaged_chunk_does_not_read(tmp_path):
  _write(str(tmp_path), _data())
  shard = tmp_path / 'activations' / SITES[0] / 'c' / '1' / '0'
  damaged = bytearray(shard.read_bytes())
  damaged[5] ^= 1
  shard.write_bytes(damaged)
  opened = store.open_store(str(tmp_path))
  first = opened.starts[1]
  opened.read_rows(0, first)
  with pytest.raises(config.UserError, match='cannot read an array'):
    opened.read_rows(first, first + 1)
  with pytest.raises(config.UserError, match=r'1 objects .*/c/1/0 cannot read'):
    opened.verify()


@pytest.mark.parametrize('name', ['activations', 'tokens', 'stream_index'])
def test_verify_finds_another_store_s_data(tmp_path, name):
  data = _data()
  # As many tokens are kept of each context, but others.
  keep = np.concatenate(
    [np.sort(part) for part in np.split(data['keep_mask'], range(16, 150, 16))]
  )
  assert (keep != data['keep_mask']).any()
  other = data | {'tokens': _flip(data['tokens']), 'keep_mask': keep}
  other['kept'] = _flip(data['kept'])
  _write(str(tmp_path / 'a'), data)
  _write(str(tmp_path / 'b'), other)
  shutil.rmtree(tmp_path / 'a' / name)
  shutil.copytree(tmp_path / 'b' / name, tmp_path / 'a' / name)
  opened = store.open_store(str(tmp_path / 'a'))
  opened.read_rows(0, opened.manifest.n_rows)
  with pytest.raises(
    config.UserError, match=f'{name}.*c/[0-9].* is not what was written'
  ):
    opened.verify()
  store.open_store(str(tmp_path / 'b')).verify()


def test_verify_finds_an_edited_manifest(tmp_path):
  manifest = _write(str(tmp_path), _data())
  path = tmp_path / 'manifest.json'
  edited = dataclasses.replace(manifest, seed=7)
  path.write_text(config.to_json(edited))
  with pytest.raises(config.UserError, match='was edited'):
    store.open_store(str(tmp_path)).verify()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'d_model': 5}, r'activations.* its manifest says float32 \(128, 5\)'),
    ({'dtype': 'bfloat16'}, 'manifest says bfloat16'),
    ({'format_version': 9}, 'format version 9, this sae_jax reads version 2'),
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
    _begin(str(tmp_path / 'file' / 'store'), _data())
  assert '\n' not in str(caught.value)
  assert 'tensorstore_spec' not in str(caught.value)


def test_a_disk_that_fails_midway(tmp_path):
  folder = tmp_path / 'store'
  _begin(str(folder), _data(), 1)
  shutil.rmtree(folder / 'activations')
  (folder / 'activations').write_text('in the way')
  (folder / 'shards' / '000000.json').unlink()
  with pytest.raises(config.UserError, match='cannot write store'):
    _begin(str(folder), _data(), 1)
  assert layout.read_manifest(str(folder)) is None
  # With the obstacle gone it goes on.
  (folder / 'activations').unlink()
  _write(str(folder), _data())
  store.open_store(str(folder)).verify()


def test_sizes_that_do_not_fit(tmp_path):
  with pytest.raises(config.UserError, match='shard_rows 100 must be a mult'):
    _begin(str(tmp_path), _data(), chunk_rows=64, shard_rows=100)
  with pytest.raises(config.UserError, match="dtype 'int8' cannot be stored"):
    _begin(str(tmp_path), _data(), dtype='int8')
  shard = writer_lib.StoreWriter(str(tmp_path), Plan(**PLAN)).shard(0)
  *stream, kept = next(_stretches(_data(), ()))
  with pytest.raises(ValueError, match='keep_mask keeps'):
    shard.append(*stream, {name: rows[1:] for name, rows in kept.items()})
  with pytest.raises(ValueError, match='differ in size'):
    shard.append(stream[0][1:], *stream[1:], kept)
  whole = next(_stretches(_data(), (149,)))
  with pytest.raises(ValueError, match='do not fit a shard of 32 and 64'):
    shard.append(*whole)


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
  local = _write(str(tmp_path), data, dtype=dtype)
  assert _write('gs://bucket/deep/store/', data, dtype=dtype) == local
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


def test_an_unfinished_store_in_a_bucket_goes_on(bucket):
  url = 'gs://bucket/store'
  _begin(url, _data(), 2)
  before = {name: o.generation for name, o in bucket.items()}
  with pytest.raises(config.UserError, match='not a finished store'):
    store.open_store(url)
  with pytest.raises(config.UserError, match='other bytes'):
    _begin(url, _data(seed=1))
  _write(url, _data())
  assert {name: bucket[name].generation for name in before} == before
  # The manifest is the last object a harvest writes.
  newest = max(bucket, key=lambda name: bucket[name].generation)
  assert newest == 'store/manifest.json'


def test_a_bucket_that_is_not_there(bucket):
  with pytest.raises(config.UserError, match='cannot write store gs://nobody'):
    _write('gs://nobody/store', _data())


def test_a_lost_shard_does_not_pass_for_zeros(tmp_path):
  _write(str(tmp_path), _data())
  lost = tmp_path / 'activations' / SITES[0] / 'c' / '1' / '0'
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
