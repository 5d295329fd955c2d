"""The store: round trips, writers, versions, gs://."""

import dataclasses
import hashlib
import itertools
import json
import threading

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from sae_jax import errors, store
from sae_jax.store import writer as writer_lib
from sae_jax.store.manifest import StorePlan
from tests.support import small


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_what_was_written_is_read(tmp_path, dtype):
  data = small.data()
  manifest = small.write(
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
  assert opened.gather([]).shape == (0, small.D)
  opened.verify()


def test_the_layout_is_sharded_zarr(tmp_path):
  small.write(str(tmp_path), small.data(), dtype='bfloat16')
  folder = tmp_path / 'activations' / small.SITES[0]
  meta = json.loads((folder / 'zarr.json').read_text())
  counts = store.open_store(str(tmp_path)).manifest.shard_counts
  assert meta['shape'] == [len(counts) * small.SHARD, small.D]
  assert meta['data_type'] == 'bfloat16'
  assert meta['chunk_grid']['configuration']['chunk_shape'] == [
    small.SHARD,
    small.D,
  ]
  (codec,) = meta['codecs']
  assert codec['name'] == 'sharding_indexed'
  assert codec['configuration']['chunk_shape'] == [
    small.CHUNK,
    small.D,
  ]
  assert len(list((folder / 'c').glob('*/0'))) == len(counts)
  # A shard ends with a context, so few are full.
  assert {rows < small.SHARD for rows, _ in counts} == {True}


def test_zarr_reads_it_without_this_library(tmp_path):
  zarr = pytest.importorskip('zarr')
  data = small.data()
  manifest = small.write(str(tmp_path), data)
  group = zarr.open(str(tmp_path / 'activations' / small.SITES[0]), mode='r')
  rows = [
    group[i * small.SHARD : i * small.SHARD + n]
    for i, (n, _) in enumerate(manifest.shard_counts)
  ]
  np.testing.assert_array_equal(np.concatenate(rows), data['kept'])
  tokens = zarr.open(str(tmp_path / 'tokens'), mode='r')
  parts = [
    tokens[2 * i * small.SHARD :][:n]
    for i, (_, n) in enumerate(manifest.shard_counts)
  ]
  np.testing.assert_array_equal(np.concatenate(parts), data['tokens'])


def test_tensorstore_reads_bfloat16_by_its_metadata(tmp_path):
  small.write(str(tmp_path), small.data(), dtype='bfloat16')
  opened = store.open_store(str(tmp_path))
  path = f'file://{tmp_path}/activations/{small.SITES[0]}/|zarr3:'
  rows_RD = ts.open(path).result()[: opened.starts[1]].read().result()
  np.testing.assert_array_equal(
    rows_RD.astype(np.float32), opened.read_rows(0, opened.starts[1])
  )


def test_several_sites_share_a_stream(tmp_path):
  data = small.data()
  small.write(str(tmp_path), data, sites=small.SITES)
  with pytest.raises(errors.UserError, match='name one of them as the site'):
    store.open_store(str(tmp_path))
  with pytest.raises(errors.UserError, match=r'not blocks\.7\.resid_post'):
    store.open_store(str(tmp_path), 'blocks.7.resid_post')
  for i, site in enumerate(small.SITES):
    opened = store.open_store(str(tmp_path), site, in_order=i > 0)
    assert opened.site == site
    np.testing.assert_array_equal(
      opened.read_rows(0, len(data['kept'])), data['kept'] + np.float32(i)
    )
    opened.verify()


def test_identity_names_data_and_config(tmp_path):
  data, numbers = small.data(), itertools.count()

  def identity(data, **fields):
    return small.write(
      str(tmp_path / str(next(numbers))), data, **fields
    ).identity

  first = identity(data)
  assert identity(data) == first
  assert identity(data, software={'jax': '9'}) == first
  others = [identity(data, dtype='bfloat16')]
  for name in ('tokens', 'documents', 'positions', 'kept'):
    others.append(identity(data | {name: small.flip(data[name])}))
  moved = data | {'keep_mask': np.roll(data['keep_mask'], 1)}
  others.append(identity(moved))
  changes = {
    'subject': 'other', 'weights_sha256': 'other', 'context_length': 17,
    'sources': ('other',), 'seed': 1, 'config': {}, 'sites': small.SITES[1:],
    'holdout_rows': 12, 'mask': {'rule': 'other'}, 'chunk_rows': 16,
    'bos': '<s>',
  }  # fmt: skip
  for name, value in changes.items():
    others.append(identity(data, **{name: value}))
  assert len({first, *others}) == 1 + len(others)


def test_stores_from_before_the_bos_keep_their_identity(tmp_path):
  manifest = small.write(str(tmp_path / 'store'), small.data())
  before = dataclasses.asdict(manifest)
  for name in ('bos', 'identity', 'software'):
    del before[name]
  text = json.dumps(before, sort_keys=True)
  assert manifest.identity == hashlib.sha256(text.encode()).hexdigest()


def test_an_unfinished_store_is_refused_and_goes_on(tmp_path):
  url = str(tmp_path / 'store')
  small.begin(url, small.data(), 2)
  with pytest.raises(errors.UserError, match='not a finished store'):
    store.open_store(url)
  # Asked for, what is complete can be read.
  begun = store.open_store(url, unsealed=True)
  assert len(begun.manifest.shard_counts) == 2 and begun.n_train > small.SHARD
  np.testing.assert_array_equal(
    begun.read_rows(0, begun.n_train), small.data()['kept'][: begun.n_train]
  )
  # Its shards stay as they are.
  before = small.files(tmp_path / 'store')
  small.write(url, small.data())
  after = small.files(tmp_path / 'store')
  assert {name: after[name] for name in before} == before
  small.write(str(tmp_path / 'clean'), small.data())
  assert after == small.files(tmp_path / 'clean')
  assert len(after) > 6


def test_of_two_writers_the_first_stays_whole_and_the_other_is_refused(
  tmp_path,
):
  url = str(tmp_path / 'store')
  first = small.begin(url, small.data())
  before = small.files(tmp_path / 'store')
  # The same bytes are the same work.
  small.begin(url, small.data())
  assert small.files(tmp_path / 'store') == before
  with pytest.raises(errors.UserError, match=r'c/0/0 of store .* other bytes'):
    small.begin(url, small.data(seed=1))
  assert small.files(tmp_path / 'store') == before
  # Also if the first one is not done yet: what it wrote stays.
  (tmp_path / 'store' / 'shards' / '000000.json').unlink()
  assert not first.records()
  with pytest.raises(errors.UserError, match='another harvest is writing'):
    small.begin(url, small.data(seed=1))
  small.begin(url, small.data())
  assert small.files(tmp_path / 'store') == before


def test_two_writers_at_once_leave_one_whole_shard(tmp_path):
  url = str(tmp_path / 'store')
  refusals, barrier = [], threading.Barrier(2)

  def work(seed):
    barrier.wait()
    try:
      small.begin(url, small.data(seed=seed))
    except errors.UserError as error:
      refusals.append(str(error))

  threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(refusals) == 1 and 'other bytes' in refusals[0]
  begun = store.open_store(url, unsealed=True)
  rows_RD = begun.read_rows(0, begun.n_train)
  assert (
    sum(
      np.array_equal(rows_RD, small.data(seed=seed)['kept'][: begun.n_train])
      for seed in (0, 1)
    )
    == 1
  )
  begun.tokens()


def test_another_plan_is_refused(tmp_path):
  small.begin(str(tmp_path), small.data())
  with pytest.raises(
    errors.UserError, match=r"another plan \(dtype: 'float32'"
  ):
    small.begin(str(tmp_path), small.data(), dtype='bfloat16')
  small.begin(str(tmp_path), small.data(), software={'jax': 'newer'})


def test_appending_makes_a_version_and_leaves_the_first(tmp_path):
  url, data = str(tmp_path), small.data()
  first = small.write(url, data)
  before = small.files(tmp_path)
  writer = writer_lib.StoreWriter(url, StorePlan(**small.PLAN))
  more = small.data(seed=1)
  shard = writer.shard(len(first.shard_counts))
  shard.append(*next(small.stretches(more, ())))
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
  after = small.files(tmp_path)
  changed = {name for name in before if after[name] != before[name]}
  assert {name.split('/')[-1] for name in changed} == {'zarr.json'}
  with pytest.raises(errors.UserError, match='not version 3 of a finished'):
    store.open_store(url, version=3)


def test_sizes_that_do_not_fit(tmp_path):
  with pytest.raises(errors.UserError, match='shard_rows 100 must be a mult'):
    small.begin(str(tmp_path), small.data(), chunk_rows=64, shard_rows=100)
  with pytest.raises(errors.UserError, match="dtype 'int8' cannot be stored"):
    small.begin(str(tmp_path), small.data(), dtype='int8')
  shard = writer_lib.StoreWriter(str(tmp_path), StorePlan(**small.PLAN)).shard(
    0
  )
  *stream, kept = next(small.stretches(small.data(), ()))
  with pytest.raises(ValueError, match='keep_mask keeps'):
    shard.append(*stream, {name: rows[1:] for name, rows in kept.items()})
  with pytest.raises(ValueError, match='differ in size'):
    shard.append(stream[0][1:], *stream[1:], kept)
  whole = next(small.stretches(small.data(), (149,)))
  with pytest.raises(ValueError, match='do not fit a shard of 32 and 64'):
    shard.append(*whole)


def test_parts_of_the_stream_and_of_its_index(tmp_path):
  url = str(tmp_path / 'store')
  small.write(url, small.data())
  opened = store.open_store(url)
  n_rows, n_stream = opened.manifest.n_rows, opened.manifest.n_stream
  whole = opened.tokens(), opened.documents(), opened.positions()
  # Within a shard, over the edges of several, the ends, none.
  for start, stop in ((3, 9), (20, 101), (0, 1), (n_rows - 1, n_rows), (5, 5)):
    np.testing.assert_array_equal(
      opened.stream_index(start, stop), opened.stream_index()[start:stop]
    )
    for part, array in zip(opened.stream(start, stop), whole):
      assert part.dtype == np.int32
      np.testing.assert_array_equal(part, array[start:stop])
  np.testing.assert_array_equal(
    opened.stream(n_stream - 2, n_stream)[0], whole[0][-2:]
  )
  for start, stop in ((-1, 3), (0, n_stream + 1), (9, 3)):
    with pytest.raises(IndexError, match='of a stream of'):
      opened.stream(start, stop)
  with pytest.raises(IndexError, match='of a store of'):
    opened.stream_index(0, n_rows + 1)


def test_rows_beyond_the_store(tmp_path):
  n = small.write(str(tmp_path), small.data()).n_rows
  opened = store.open_store(str(tmp_path))
  for start, stop in ((-1, 2), (0, n + 1), (5, 4)):
    with pytest.raises(IndexError):
      opened.read_rows(start, stop)
  for row in (-1, n):
    with pytest.raises(IndexError):
      opened.gather([0, row])


def test_zeros_are_stored_and_read(tmp_path):
  data = small.data()
  data = {k: v if k == 'keep_mask' else v * 0 for k, v in data.items()}
  small.write(str(tmp_path), data)
  opened = store.open_store(str(tmp_path))
  assert not opened.read_rows(0, opened.manifest.n_rows).any()
  assert not opened.tokens().any()
