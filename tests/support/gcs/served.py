"""Harvest, training, probing and page in a bucket that fails: as on a disk."""

import contextlib

from etils.epath import backend

from sae_jax.storage import url as url_lib
from tests.support.gcs import fake_gcs, gcs_clients


@contextlib.contextmanager
def bucket(monkeypatch, faults=None):
  """A server of gs://bucket, whose clients do not wait for seconds."""
  plain, undo = url_lib.kvstore, gcs_clients.hurry()

  def quick(url):
    spec = plain(url)
    more = gcs_clients.QUICK_RETRIES if spec['driver'] == 'gcs' else {}
    return spec | more

  server = fake_gcs.FakeGcs(['bucket'], faults)
  with server as url, monkeypatch.context() as patch:
    patch.setenv('TENSORSTORE_GCS_HTTP_URL', url)
    patch.setenv('STORAGE_EMULATOR_HOST', url)
    patch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'fake')
    patch.setattr(url_lib, 'kvstore', quick)
    gcsfs = gcs_clients.filesystem(url)
    plain_fs = backend.fsspec_backend.fs
    patch.setattr(
      backend.fsspec_backend,
      'fs',
      lambda path: gcsfs if str(path).startswith('gs://') else plain_fs(path),
    )
    yield server
  undo()
