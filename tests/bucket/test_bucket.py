"""The same commands with gs:// URLs, on a server of this process."""

import json
import os
import subprocess
import sys

from etils.epath import backend
import jax
import numpy as np
import pytest

from sae_jax import checkpoint
from sae_jax.training import log
from tests.support import planted, processes
from tests.support.gcs import fake_gcs, gcs_clients, gcs_faults, served

_TRAIN = """
from tests.support.gcs import gcs_clients
gcs_clients.hurry()
from sae_jax.cli import train
train.main()
"""


def train(store, workdir, url):
  """A run whose latents, and so its checkpoints, are over two devices."""
  environment = processes.environment(devices=2) | {
    'TENSORSTORE_GCS_HTTP_URL': url,
    'STORAGE_EMULATOR_HOST': url,
    'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'fake',
  }
  flags = {
    'store': store, 'workdir': workdir, 'n_latents': 64, 'k': 4,
    'batch_size': 64, 'steps': 20, 'checkpoint_every': 10, 'mesh_latent': 2,
    'sample_rows': 500, 'log_every': 1,
  }  # fmt: skip
  return subprocess.run(
    [sys.executable, '-c', _TRAIN]
    + [f'--{name}={value}' for name, value in flags.items()],
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )


@pytest.fixture(scope='module')
def on_disk(tmp_path_factory):
  """The folder of a run on disk."""
  folder = tmp_path_factory.mktemp('local')
  planted.write_store(str(folder / 'store'))
  found = train(str(folder / 'store'), str(folder / 'run'), 'http://nobody')
  assert found.returncode == 0, found.stderr
  return folder / 'run'


def test_a_run_in_a_bucket_that_fails_is_the_run_on_disk(
  tmp_path, monkeypatch, on_disk
):
  remote = 'gs://bucket/deep/store', 'gs://bucket/deep/run'
  faults = gcs_faults.Faults(0, 0.1, gcs_faults.ALL_KINDS)
  with served.bucket(monkeypatch, faults) as server:
    url = os.environ['STORAGE_EMULATOR_HOST']
    planted.write_store(remote[0])
    server.reset_counts()
    found = train(*remote, url)
    assert found.returncode == 0, found.stderr
    print(server.table(per=20))
    assert server.faults_met.total() > 20
    again = train(*remote, url)
    assert 'is finished: step 20' in again.stderr
    objects = {name: o.data for name, o in server.objects['bucket'].items()}
  rows = (on_disk / 'metrics.jsonl').read_bytes()
  assert objects['deep/run/metrics.jsonl'] == rows
  assert json.loads(objects['deep/run/config.json']) == json.loads(
    (on_disk / 'config.json').read_text()
  )
  assert any('tensorboard' in name for name in objects)
  # The checkpoint's bytes, copied to disk, load as the local run's do.
  for name, data in objects.items():
    if name.startswith('deep/run/checkpoints/'):
      path = tmp_path / 'copy' / name.removeprefix('deep/run/')
      path.parent.mkdir(parents=True, exist_ok=True)
      if not name.endswith('/'):
        path.write_bytes(data)
  copied = checkpoint.load(str(tmp_path / 'copy'))
  want = checkpoint.load(str(on_disk))
  assert copied.step == want.step == 20
  for a, b in zip(jax.tree.leaves(copied.sae), jax.tree.leaves(want.sae)):
    np.testing.assert_array_equal(a, b)


def test_lost_answers_do_not_stop_the_metrics(monkeypatch):
  faults = gcs_faults.Faults(0, 0.5, ('drop-after',))
  server = fake_gcs.FakeGcs(['bucket'], faults)
  undo = gcs_clients.hurry()
  with server as url:
    files = gcs_clients.filesystem(url)
    monkeypatch.setattr(backend.fsspec_backend, 'fs', lambda path: files)
    writer = log.Writer('gs://bucket/run', 0)
    # More than tensorboardX's queue holds when nobody takes from it.
    for step in range(1, 41):
      writer.write(step, {'loss': 1 / step})
      if step % 10 == 0:
        writer.flush()
    writer.close()
  undo()
  assert server.faults_met['drop-after'] > 2
  objects = {name: o.data for name, o in server.objects['bucket'].items()}
  assert len(objects.pop('run/metrics.jsonl').splitlines()) == 40
  ((name, data),) = objects.items()
  assert name.startswith('run/tensorboard/events.out.tfevents')
  assert data.count(b'loss') >= 40


def test_a_bucket_that_refuses_does_not_stop_the_board(monkeypatch):
  server = fake_gcs.FakeGcs(['bucket'], gcs_faults.Faults(0, 1, ('503',)))
  undo = gcs_clients.hurry()
  with server as url:
    files = gcs_clients.filesystem(url)
    monkeypatch.setattr(backend.fsspec_backend, 'fs', lambda path: files)
    board = log._BucketEvents('gs://bucket/run/events')
    board.write(b'data')
    board.flush()
    server.faults = None
    board.close()
  undo()
  assert server.objects['bucket']['run/events'].data == b'data'


def test_a_bucket_that_is_not_there_is_one_line():
  with fake_gcs.FakeGcs(['bucket']) as url:
    found = train('gs://other/store', 'gs://other/run', url)
  assert found.returncode == 2
  assert found.stderr.splitlines()[-1].startswith('error: ')
