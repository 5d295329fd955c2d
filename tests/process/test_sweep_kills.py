"""Workers of a sweep that are killed, and the sweep ends with the same table.

`SAE_JAX_SWEEP_KILLS=10` kills one so often, at random moments.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import time

import pytest

from tests.support import planted, processes

KILLS = int(os.environ.get('SAE_JAX_SWEEP_KILLS', '1'))
# A worker that is gone is noticed after so many seconds.
LAPSE = 3


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  url = str(tmp_path_factory.mktemp('sweep') / 'store')
  planted.write_store(url)
  return url


def start(store, workdir):
  """A worker of a sweep of six runs, four at a time."""
  values = {
    'store': store, 'workdir': workdir, 'n_latents': 32, 'k_aux': 8,
    'batch_size': 64, 'sample_rows': 500, 'window_chunks': 4,
    'log_every': 1, 'checkpoint_every': 20, 'learning_rate': 1e-3,
    'decay_steps': 0, 'warmup_steps': 0, 'runs_at_a_time': 4,
    'claim_minutes': LAPSE / 60,
  }  # fmt: skip
  grid = 'k=2,4', 'seed=0,1,2', 'tokens=12800'
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      'sae_jax.cli.sweep',
      *(f'--{name}={value}' for name, value in values.items()),
      *(f'--grid={axis}' for axis in grid),
    ],
    env=processes.environment(devices=1),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def ended(worker):
  out, said = worker.communicate(timeout=240)
  assert worker.returncode == 0, said
  assert '6 of 6 runs are done' in out
  return said


def table(workdir):
  """What the runs came to, and the bytes of their logs."""
  records = {
    path.name: json.loads(path.read_text())
    for path in pathlib.Path(workdir, 'cells').iterdir()
  }
  logs = {
    path.parent.name: path.read_bytes()
    for path in pathlib.Path(workdir, 'runs').glob('*/metrics.jsonl')
  }
  return records, logs


@pytest.fixture(scope='module')
def whole(store, tmp_path_factory):
  """The table of a worker that nobody disturbs, and its seconds."""
  workdir = tmp_path_factory.mktemp('whole')
  began = time.monotonic()
  ended(start(store, workdir))
  return table(workdir), time.monotonic() - began


@pytest.mark.parametrize('seed', range(KILLS))
def test_a_sweep_whose_worker_is_killed_ends_with_the_same_table(
  store, whole, tmp_path, seed
):
  want, seconds = whole
  worker = start(store, tmp_path)
  time.sleep(random.Random(seed).uniform(0.2, 0.95) * seconds)
  worker.kill()
  worker.communicate()
  # What it had is waited for until its claims lapse.
  ended(start(store, tmp_path))
  assert table(tmp_path) == want
  assert not list((tmp_path / 'claims').iterdir())


def test_two_workers_share_a_sweep(store, whole, tmp_path):
  workers = [start(store, tmp_path) for _ in range(2)]
  said = [ended(worker) for worker in workers]
  assert table(tmp_path) == whole[0]
  # A run is begun once: nobody goes on from another's checkpoint.
  assert not any('resumes after' in text for text in said)
  assert all('are next' in text for text in said)
