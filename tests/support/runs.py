"""Training runs in tests: broken off, killed, spoilt, compared."""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from sae_jax import checkpoint, mesh
from sae_jax import config as config_lib
from sae_jax.feed import from_store
from sae_jax.training import run as run_lib
from sae_jax.training import train
from sae_jax.training.config import TrainConfig
from sae_jax.training.state import abstract_state
from tests.support import planted, processes

SPOILT_ROW = 100


def log(workdir):
  """The bytes of a run's metrics."""
  return pathlib.Path(workdir, 'metrics.jsonl').read_bytes()


def rows(workdir):
  """A run's metrics."""
  return [json.loads(line) for line in log(workdir).splitlines()]


def saved_steps(workdir):
  """The steps of a run's finished checkpoints."""
  folder = pathlib.Path(workdir, 'checkpoints')
  found = folder.iterdir() if folder.exists() else []
  return sorted(int(path.name) for path in found if path.name.isdigit())


def saved_config(workdir):
  """The config of a run's latest checkpoint."""
  with checkpoint.open_checkpointer(workdir) as checkpointer:
    saved = checkpoint.read_metadata(checkpointer, checkpointer.latest.step)
  return config_lib.from_dict(TrainConfig, saved.train_config)


def saved_state(workdir):
  """The whole state of a run's latest checkpoint, on this process's mesh."""
  config = saved_config(workdir)
  with checkpoint.open_checkpointer(workdir) as checkpointer:
    return run_lib.restore(
      checkpointer,
      abstract_state(config, mesh.make_mesh(1, jax.device_count())),
    )


def assert_same_bits(got, want):
  """Equal trees, to the sign of a zero."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    a, b = np.asarray(a), np.asarray(b)
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    np.testing.assert_array_equal(
      a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)
    )


def assert_same_run(got, want):
  """Two workdirs with the same last state and the same metrics."""
  assert_same_bits(saved_state(got), saved_state(want))
  assert log(got) == log(want)


class Stop(Exception):
  """Breaks a run off."""


def break_off(step, configs, store):
  """Trains until the batch of a step is asked for."""
  whole = from_store.StoreFeed.iterate

  def breaks_off(self, start, stop, *args):
    for number, batch in enumerate(whole(self, start, stop, *args), start):
      if number == step:
        raise Stop
      yield batch

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(from_store.StoreFeed, 'iterate', breaks_off)
    with pytest.raises(Stop):
      train.train_many(configs, store)


@contextlib.contextmanager
def batches_seen():
  """A list that gets the step and the rows' digests of each batch made."""
  whole, seen = from_store.StoreFeed.batch, []

  def batch(self, step):
    made = whole(self, step)
    digests = [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in made]
    seen.append((step, ' '.join(digests)))
    return made

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(from_store.StoreFeed, 'batch', batch)
    yield seen


def write_spoilt_store(url):
  """A store with one training row that is not finite."""
  rows_RD = planted.activations(2090)
  rows_RD[SPOILT_ROW] = np.inf
  planted.write_store(url, rows_RD=rows_RD)


def spoilt_step(config, data):
  """The first step whose batch holds the row."""
  order = from_store.train_order(data, config.order_seed, config.window_chunks)
  places = order.lane().rows_at(0, data.n_train)
  return int(np.argmax(places == SPOILT_ROW)) // config.batch_size + 1


def train_config(**kwargs):
  """A run of seconds in which AuxK, clipping and the average take part."""
  made = planted.train_config()
  active = {
    'objective': dataclasses.replace(made.objective, dead_after_tokens=128),
    'optimizer': dataclasses.replace(made.optimizer, clip_norm=0.25),
  }
  return planted.train_config(**(active | kwargs))


def assert_active(workdir):
  """AuxK and clipping took part in a run of `train_config` or `command`."""
  found = rows(workdir)
  assert max(row.get('aux', 0) for row in found) > 0
  assert max(row.get('grad_norm', 0) for row in found) > 0.25


def flags(store, workdir, **changes):
  """Of sae-train, with AuxK, clipping and the average taking part."""
  values = {
    'store': store, 'workdir': workdir, 'n_latents': 64, 'k': 4, 'k_aux': 8,
    'dead_after_tokens': 300, 'learning_rate': 3e-3, 'ema_decay': 0.9,
    'warmup_steps': 0, 'decay_steps': 0,
    'clip_norm': 0.25, 'batch_size': 64, 'steps': 30, 'sample_rows': 500,
    'window_chunks': 4, 'log_every': 1,
  }  # fmt: skip
  return [f'--{name}={value}' for name, value in (values | changes).items()]


def command(store, workdir, **changes):
  """sae-train with these flags."""
  module = [sys.executable, '-m', 'sae_jax.cli.train']
  return module + flags(store, workdir, **changes)


def start(command, devices=1):
  """Starts a command with so many devices; its output is kept."""
  return subprocess.Popen(
    command,
    env=processes.environment(devices),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def start_two(command):
  """Starts a command in two joined processes of four devices each."""
  joined = [
    f'--coordinator=127.0.0.1:{processes.free_port()}',
    '--num_processes=2',
  ]
  return [
    start([*command, *joined, f'--process_id={number}'], 4)
    for number in range(2)
  ]


def ended(process, code=0):
  """Waits for a process's exit code; returns its output and its errors."""
  out, said = process.communicate(timeout=300)
  assert process.returncode == code, said
  return out, said


def run(command, code=0, devices=1):
  """Runs a command to an exit code; returns its output and its errors."""
  return ended(start(command, devices), code)


def wait_until(reached, *running):
  """Waits for something that processes do, while all of them run."""
  while not reached():
    for process in running:
      assert process.poll() is None, process.communicate()[1]
    time.sleep(0.001)


STOPPED = re.compile(
  r'stopped by SIGTERM and saved after step (\d+), '
  r'the same command does the (\d+) that are left'
)


def stopped_at(said, steps):
  """The step that a stopped run says it was saved after."""
  done, left = map(int, STOPPED.search(said).groups())
  assert done + left == steps
  return done
