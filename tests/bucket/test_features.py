"""A feature table in a bucket."""

import dataclasses

import numpy as np
import pytest

from sae_jax import errors
from sae_jax import features as features_lib
from sae_jax.features import columns, writer
from tests.support import pipeline, synthetic_features
from tests.support.gcs import served

URL = 'gs://bucket/deep/features'


@pytest.fixture
def bucket(monkeypatch):
  """The objects of gs://bucket, by name."""
  with served.bucket(monkeypatch) as server:
    yield server.objects['bucket']


@pytest.fixture(scope='module')
def made():
  return synthetic_features.make(
    n_latents=100, n_examples=3, window=8, n_tokens=2000
  )[0]


def test_a_bucket_holds_the_same_bytes_as_a_folder(made, tmp_path, bucket):
  writer.write(URL, made)
  writer.write(tmp_path, made)
  objects = {
    name.removeprefix('deep/features/'): o.data for name, o in bucket.items()
  }
  assert objects == pipeline.files(tmp_path)
  remote, here = features_lib.open(URL + '/'), features_lib.open(tmp_path)
  for name, array in remote.latents(50, 90).items():
    np.testing.assert_array_equal(array, here.latents(50, 90)[name])
  assert remote.verify() == here.verify()


def test_a_table_that_was_stopped_goes_on_or_is_cleared(made, bucket):
  rows = {
    name: array
    for name, array in made.items()
    if not columns.COLUMNS[name].is_shared
  }
  table = features_lib.TableWriter(URL, writer.plan(made))
  table.write(64, {name: array[64:] for name, array in rows.items()})
  before = {name: o.generation for name, o in bucket.items()}
  with pytest.raises(errors.UserError, match='is no finished feature table'):
    features_lib.open(URL)
  with pytest.raises(errors.UserError, match=r'max/c/1 .* with other bytes'):
    table.write(64, {'max': rows['max'][64:] + 1})
  writer.write(URL, made)
  assert {name: bucket[name].generation for name in before} == before
  # The manifest is the last object.
  newest = max(bucket, key=lambda name: bucket[name].generation)
  assert newest == 'deep/features/manifest.json'
  features_lib.open(URL).latents(0, 100)
  writer.clear(URL)
  assert not [name for name in bucket if not name.endswith('/')]
  writer.write(URL, made | {'max': made['max'] + 1})
  features_lib.open(URL).verify()


def test_damage_in_a_bucket_is_named(made, bucket):
  writer.write(URL, made)
  name = 'deep/features/top_acts/c/1/0/0'
  data = bucket[name].data
  data = data[:50] + bytes([data[50] ^ 1]) + data[51:]
  bucket[name] = dataclasses.replace(bucket[name], data=data)
  with pytest.raises(errors.UserError, match='cannot read top_acts/c/1/0/0'):
    features_lib.open(URL).latents(0, 100)
  with pytest.raises(errors.UserError, match=r'1 objects .*_acts/c/1/0/0 is'):
    features_lib.open(URL).verify()
  del bucket['deep/features/count/c/0']
  with pytest.raises(errors.UserError, match='cannot read count/c/0 of'):
    features_lib.open(URL).latents(0, 1)


def test_a_bucket_that_is_not_there(made, bucket):
  with pytest.raises(errors.UserError, match='cannot write features gs://nob'):
    writer.write('gs://nobody/features', made)
