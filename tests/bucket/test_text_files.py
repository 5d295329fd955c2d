"""Text files in a bucket."""

import fsspec

from tests.support import text_sources
from tests.support.gcs import fake_gcs, gcs_clients, gcs_faults


def test_a_bucket_is_read_as_a_folder_is(tmp_path, monkeypatch):
  lines, _ = text_sources.write_folder(tmp_path / 'data')
  faults = gcs_faults.Faults(0, 0.1)
  server = fake_gcs.FakeGcs(['bucket'], faults)
  for path in (tmp_path / 'data').rglob('*.*'):
    if path.is_file():
      name = path.relative_to(tmp_path).as_posix()
      server.put('bucket', name, path.read_bytes(), {})
  undo = gcs_clients.hurry()
  with server as url:
    files = gcs_clients.filesystem(url)
    monkeypatch.setattr(
      fsspec, 'url_to_fs', lambda place: (files, files._strip_protocol(place))
    )
    texts = text_sources.texts(('gs://bucket/data',), seed=0)
    of_glob = text_sources.texts(('gs://bucket/data/*.jsonl',), seed=0)
  undo()
  monkeypatch.undo()
  assert texts == text_sources.texts((str(tmp_path / 'data'),), seed=0)
  assert sorted(of_glob) == sorted(lines)
