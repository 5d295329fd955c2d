"""A harvest into a bucket is the one on a disk."""

import pytest

from sae_jax import store
from sae_jax.storage import url as url_lib
from tests.support import toy
from tests.support.gcs import fake_gcs, gcs_clients, gcs_faults


@pytest.mark.parametrize('rate', [0.0, 0.1])
def test_a_bucket_gets_the_same_store(texts, tmp_path, monkeypatch, rate):
  local = url_lib.kvstore

  def quick(url):
    spec = local(url)
    if spec['driver'] == 'gcs':
      spec |= gcs_clients.QUICK_RETRIES
    return spec

  monkeypatch.setattr(url_lib, 'kvstore', quick)
  server = fake_gcs.FakeGcs(['bucket'], gcs_faults.Faults(0, rate))
  with server as url:
    monkeypatch.setenv('TENSORSTORE_GCS_HTTP_URL', url)
    monkeypatch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'fake')
    remote = toy.run(toy.config(texts), 'gs://bucket/store')
    assert remote == toy.run(toy.config(texts), tmp_path / 'store')
    assert toy.run(toy.config(texts), 'gs://bucket/store') == remote
    server.reset_counts()
    opened = store.open_store('gs://bucket/store')
    opened.verify()
    print(server.table())
  if rate:
    assert sum(server.faults_met.values()) > 10
  # Every byte, lost answers or not.
  objects = server.objects['bucket']
  paths = [p for p in (tmp_path / 'store').rglob('*') if p.is_file()]
  assert len(objects) == len(paths)
  for path in paths:
    name = f'store/{path.relative_to(tmp_path / "store")}'
    assert objects[name].data == path.read_bytes()
