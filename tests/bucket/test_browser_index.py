"""The page in a bucket."""

import gcsfs
import pytest

from sae_jax.browser import index
from tests.support import synthetic_features
from tests.support.gcs import fake_gcs


@pytest.fixture(scope='module')
def made():
  return synthetic_features.make(
    n_latents=30, n_examples=4, window=24, n_tokens=4000
  )


def test_a_bucket_holds_the_same_bytes_as_a_folder(made, tmp_path, monkeypatch):
  synthetic_features.build(*made, tmp_path)
  server = fake_gcs.FakeGcs(['bucket'])
  with server as url:
    monkeypatch.setenv('STORAGE_EMULATOR_HOST', url)
    # File systems are kept by their arguments, which do not name the server.
    gcsfs.GCSFileSystem.clear_instance_cache()
    small = index.BrowseConfig(features_per_shard=7)
    synthetic_features.build(*made, 'gs://bucket/some/page', small)
    page = synthetic_features.build(*made, 'gs://bucket/some/page')
    gcsfs.GCSFileSystem.clear_instance_cache()
  assert page == 'gs://bucket/some/page/index.html'
  objects = {
    name.removeprefix('some/page/'): o.data
    for name, o in server.objects['bucket'].items()
  }
  assert objects == {
    str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob('*.*')
  }
