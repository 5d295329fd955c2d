"""A harvest into a bucket is the one on a disk."""

import pytest

from sae_jax import store
from tests.support import toy
from tests.support.gcs import gcs_faults, served


@pytest.mark.parametrize('rate', [0.0, 0.1])
def test_a_bucket_gets_the_same_store(texts, tmp_path, monkeypatch, rate):
  with served.bucket(monkeypatch, gcs_faults.Faults(0, rate)) as server:
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
