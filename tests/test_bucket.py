"""The same commands with gs:// URLs, on a server of this process."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from sae_jax import checkpoint
from tests import fake_gcs, planted

pytestmark = pytest.mark.slow


def train(store, workdir, url):
  environment = os.environ | {
    'TENSORSTORE_GCS_HTTP_URL': url,
    'STORAGE_EMULATOR_HOST': url,
    'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'fake',
    # Else every call of gcsfs asks a service that is not there.
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    'TF_CPP_MIN_LOG_LEVEL': '3',
  }
  flags = {
    'store': store, 'workdir': workdir, 'n_latents': 64, 'k': 4,
    'batch_size': 64, 'steps': 20, 'checkpoint_every': 10, 'mesh_latent': 8,
    'sample_rows': 500, 'log_every': 1,
  }  # fmt: skip
  return subprocess.run(
    [sys.executable, '-m', 'sae_jax.cli.train']
    + [f'--{name}={value}' for name, value in flags.items()],
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )


def test_a_run_in_a_bucket_is_the_run_on_disk(tmp_path, monkeypatch):
  local = str(tmp_path / 'store'), str(tmp_path / 'run')
  remote = 'gs://bucket/deep/store', 'gs://bucket/deep/run'
  server = fake_gcs.FakeGcs(['bucket'])
  with server as url:
    planted.write_store(local[0])
    monkeypatch.setenv('TENSORSTORE_GCS_HTTP_URL', url)
    monkeypatch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'fake')
    planted.write_store(remote[0])
    for store, workdir in (local, remote):
      found = train(store, workdir, url)
      assert found.returncode == 0, found.stderr
    again = train(*remote, url)
    assert 'is finished: step 20' in again.stderr
    objects = {name: o.data for name, o in server.objects['bucket'].items()}
  rows = (tmp_path / 'run' / 'metrics.jsonl').read_bytes()
  assert objects['deep/run/metrics.jsonl'] == rows
  assert json.loads(objects['deep/run/config.json']) == json.loads(
    (tmp_path / 'run' / 'config.json').read_text()
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
  want = checkpoint.load(local[1])
  assert copied.step == want.step == 20
  for a, b in zip(jax.tree.leaves(copied.sae), jax.tree.leaves(want.sae)):
    np.testing.assert_array_equal(a, b)


def test_a_bucket_that_is_not_there_is_one_line():
  with fake_gcs.FakeGcs(['bucket']) as url:
    found = train('gs://other/store', 'gs://other/run', url)
  assert found.returncode == 2
  assert found.stderr.splitlines()[-1].startswith('error: ')
