"""Files for the dashboards of others in a bucket."""

import datetime
import types

import pytest

from sae_jax.dashboards import bundle, latent_cache
from sae_jax.dashboards.config import DashboardConfig
from tests.support import explained, pipeline
from tests.support.gcs import served


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A store, its autoencoder, finished results."""
  folder = tmp_path_factory.mktemp('made')
  data = explained.write_store(str(folder / 'S'))
  trained = explained.make_trained(data)
  explained.write_results(str(folder / 'P'), data, trained)
  with explained.without_files(trained):
    yield str(folder / 'P'), data.url


def test_a_bucket_holds_the_same_bytes_as_a_folder(made, tmp_path, monkeypatch):
  workdir, store_url = made
  noon = datetime.datetime(2026, 1, 1, 12)
  clock = types.SimpleNamespace(now=lambda zone: noon)
  fixed = types.SimpleNamespace(UTC=datetime.UTC, datetime=clock)
  monkeypatch.setattr(bundle, 'datetime', fixed)
  config = DashboardConfig()
  with served.bucket(monkeypatch) as server:
    for out in ('gs://bucket/out', str(tmp_path)):
      bundle.write(config, workdir, out)
      latent_cache.write(config, workdir, 'C', store_url, out)
    objects = server.objects['bucket']
  want = pipeline.files(tmp_path)
  assert {n.removeprefix('out/'): of.data for n, of in objects.items()} == want
  assert 'made/0-resid_post/model.jsonl' in want
  assert 'latents/blocks.0.resid_post/config.json' in want
  # What a reader looks for is the last of its folder.
  for last in ('model.jsonl', 'config.json'):
    (name,) = (n for n in objects if n.endswith(last))
    folder = name.removesuffix(last)
    newest = max(
      (n for n in objects if n.startswith(folder)),
      key=lambda n: objects[n].generation,
    )
    assert newest == name
