"""A store in a bucket."""

import numpy as np
import pytest

from sae_jax import errors, store
from sae_jax.storage import workdir
from tests.support import small
from tests.support.gcs import served


@pytest.fixture
def bucket(monkeypatch):
  """The objects of gs://bucket, by name."""
  with served.bucket(monkeypatch) as server:
    yield server.objects['bucket']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_bucket_holds_the_same_bytes_as_a_folder(tmp_path, bucket, dtype):
  data = small.data()
  local = small.write(str(tmp_path), data, dtype=dtype)
  assert small.write('gs://bucket/deep/store/', data, dtype=dtype) == local
  objects = {
    name.removeprefix('deep/store/'): o.data for name, o in bucket.items()
  }
  assert objects == small.files(tmp_path)
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
  small.begin(url, small.data(), 2)
  before = {name: o.generation for name, o in bucket.items()}
  with pytest.raises(errors.UserError, match='not a finished store'):
    store.open_store(url)
  with pytest.raises(errors.UserError, match='other bytes'):
    small.begin(url, small.data(seed=1))
  small.write(url, small.data())
  assert {name: bucket[name].generation for name in before} == before
  # The manifest is the last object a harvest writes.
  newest = max(bucket, key=lambda name: bucket[name].generation)
  assert newest == 'store/manifest.json'


def test_a_bucket_that_is_not_there(bucket):
  with pytest.raises(errors.UserError, match='cannot write store gs://nobody'):
    small.write('gs://nobody/store', small.data())


def test_a_server_that_does_not_answer_is_one_line(monkeypatch):
  with served.bucket(monkeypatch):

    def refuse(*_):
      raise ConnectionError('no route')

    monkeypatch.setattr(workdir, 'check_own', refuse)
    with pytest.raises(errors.UserError, match='store gs://bucket/a: no route'):
      small.write('gs://bucket/a', small.data())
