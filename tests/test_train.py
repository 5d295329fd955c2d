"""Training runs: they learn, resume to the bit, and refuse what misfits."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from sae_jax import checkpoint, train
from sae_jax.activations import store as store_lib
from sae_jax.config import UserError
from sae_jax.probing import reconstruction
from tests import planted


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  url = str(tmp_path_factory.mktemp('planted') / 'store')
  planted.write_store(url)
  return url


@pytest.fixture(scope='module')
def finished(store, tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp('runs') / 'whole')
  return workdir, train.train(planted.train_config(), store, workdir)


def rows(workdir):
  text = pathlib.Path(workdir, 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def assert_same_bits(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.fast
def test_training_learns_planted_directions(store, tmp_path):
  config = planted.train_config(steps=400, log_every=50)
  train.train(config, store, str(tmp_path / 'run'))
  trained = checkpoint.load(str(tmp_path / 'run'))
  data = store_lib.open_store(store)
  span = (data.n_train, data.manifest.n_rows, 256)
  found = reconstruction.measure(trained, data, *span, 'test')
  sample_BD = data.read_rows(0, 500)
  fresh = reconstruction.untrained(config.sae, sample_BD, 5)
  control = reconstruction.measure(fresh, data, *span, 'test')
  pca = reconstruction.pca_fvu(trained, data, *span[:2], config.sae.k, 256)
  assert found.fvu < 0.5 * min(control.fvu, pca)
  heldout = [row for row in rows(tmp_path / 'run') if 'heldout_fvu' in row]
  # The loop's evaluation is the same code on whole batches of these rows.
  np.testing.assert_allclose(heldout[-1]['heldout_fvu'], found.fvu, rtol=0.1)


@pytest.mark.fast
def test_log_has_every_step_once_and_no_clock(finished):
  steps = [row['step'] for row in rows(finished[0]) if 'loss' in row]
  assert steps == list(range(1, 31))
  assert set(rows(finished[0])[0]) == {
    'step', 'loss', 'nmse', 'aux', 'l0', 'dead_fraction', 'learning_rate',
  }  # fmt: skip


@pytest.mark.fast
def test_stopped_and_resumed_is_uninterrupted(
  finished, store, tmp_path, monkeypatch
):
  workdir = str(tmp_path / 'run')
  config = planted.train_config()

  class Stop(Exception):
    pass

  whole = train.feed.Feed.iterate

  def breaks_off(self, start, stop, *args):
    for number, batch in enumerate(whole(self, start, stop, *args), start):
      if number == 17:
        raise Stop
      yield batch

  monkeypatch.setattr(train.feed.Feed, 'iterate', breaks_off)
  with pytest.raises(Stop):
    train.train(config, store, workdir)
  monkeypatch.undo()
  assert checkpoint.load(workdir).step == 10
  state = train.train(config, store, workdir)
  assert_same_bits(state, finished[1])
  assert rows(workdir) == rows(finished[0])


@pytest.mark.fast
def test_control_another_seed_gives_other_bits(finished, store, tmp_path):
  config = planted.train_config(seed=1)
  state = train.train(config, store, str(tmp_path / 'run'))
  assert (
    np.asarray(state.sae.w_enc_ND) != np.asarray(finished[1].sae.w_enc_ND)
  ).any()


@pytest.mark.fast
def test_resume_on_another_mesh(finished, store, tmp_path, monkeypatch):
  workdir = str(tmp_path / 'run')
  config = planted.train_config(steps=20, checkpoint_every=10)
  train.train(config, store, workdir)
  # The same run, lengthened and on another mesh, as its config then says.
  longer = planted.train_config(mesh_data=2, mesh_latent=4)
  identity = store_lib.open_store(store).manifest.identity
  record = {'train_config': dataclasses.asdict(longer), 'dataset': identity}
  pathlib.Path(workdir, 'config.json').write_text(json.dumps(record))
  state = train.train(longer, store, workdir)
  assert state.sae.w_enc_ND.sharding.shard_shape((64, 16)) == (16, 16)
  for got, want in zip(
    jax.tree.leaves(state.sae), jax.tree.leaves(finished[1].sae)
  ):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.fast
def test_a_finished_run_is_left_alone(finished, store):
  before = rows(finished[0])
  state = train.train(planted.train_config(), store, finished[0])
  assert_same_bits(state, finished[1])
  assert rows(finished[0]) == before


@pytest.mark.fast
def test_a_workdir_with_another_config_is_refused(finished, store):
  other = planted.train_config(batch_size=128, seed=3)
  with pytest.raises(
    UserError, match=r'batch_size: 64 -> 128; seed: 0 -> 3\): use another'
  ):
    train.train(other, store, finished[0])


@pytest.mark.fast
def test_misfits_are_refused(store, tmp_path):
  def refused(message, **kwargs):
    with pytest.raises(UserError, match=message):
      train.train(planted.train_config(**kwargs), store, str(tmp_path / 'none'))

  sae = planted.train_config().sae
  refused(
    'd_model 24 is not the width 16 of the store: use --d_model=16',
    sae=dataclasses.replace(sae, d_model=24),
  )
  refused(
    r'n_latents 60 must be a multiple of the latent axis \(8\): use 64',
    sae=dataclasses.replace(sae, n_latents=60),
  )
  refused(
    r'batch_size 63 must be a multiple of the data axis \(2\): use 64',
    batch_size=63, mesh_data=2, mesh_latent=4,
  )  # fmt: skip
  refused('steps 0 must be at least 1', steps=0)
  assert not (tmp_path / 'none').exists()


@pytest.mark.fast
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  rows_RD = planted.activations(2090)
  rows_RD[100] = np.inf
  planted.write_store(str(tmp_path / 'store'), rows_RD=rows_RD)
  with pytest.raises(FloatingPointError, match='loss nan at step'):
    train.train(
      planted.train_config(sample_rows=50),
      str(tmp_path / 'store'),
      str(tmp_path / 'run'),
    )


@pytest.mark.fast
def test_load_says_what_is_missing(finished, tmp_path):
  with pytest.raises(UserError, match='no checkpoints under'):
    checkpoint.load(str(tmp_path))
  with pytest.raises(UserError, match='no checkpoint of step 7: it has 20, 30'):
    checkpoint.load(finished[0], step=7)


@pytest.mark.fast
def test_load_gives_the_average_or_the_last_weights(finished):
  last = checkpoint.load(finished[0], average=False)
  assert_same_bits(last.sae, finished[1].sae)
  average = checkpoint.load(finished[0])
  want = train.optimizer.averaged(
    planted.train_config().optimizer,
    finished[1].sae,
    finished[1].optimizer.ema,
  )
  assert_same_bits(average.sae, want)
  assert (average.sae.w_enc_ND != last.sae.w_enc_ND).any()
  assert average.config == planted.train_config().sae
  assert average.about['dataset']['identity']
  assert average.mse_of_mean == float(finished[1].mse_of_mean)


def command(store, workdir):
  flags = {
    'store': store, 'workdir': workdir, 'n_latents': 64, 'k': 4, 'k_aux': 8,
    'dead_after_tokens': 600, 'learning_rate': 3e-3, 'ema_decay': 0.9,
    'batch_size': 64, 'steps': 4000, 'sample_rows': 500, 'window_chunks': 4,
    'log_every': 10, 'checkpoint_every': 200, 'mesh_latent': 8,
  }  # fmt: skip
  return [sys.executable, '-m', 'sae_jax.cli.train'] + [
    f'--{name}={value}' for name, value in flags.items()
  ]


@pytest.mark.slow
def test_killed_and_started_again_ends_with_the_same_bits(store, tmp_path):
  whole, killed = str(tmp_path / 'whole'), str(tmp_path / 'killed')
  environment = os.environ | {'TF_CPP_MIN_LOG_LEVEL': '3'}
  subprocess.run(
    command(store, whole), check=True, env=environment, capture_output=True
  )
  kills = 0
  for wanted in (1, 900, 2100):
    process = subprocess.Popen(
      command(store, killed),
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    log = pathlib.Path(killed, 'metrics.jsonl')
    # Between checkpoints, and often while one is being written.
    while process.poll() is None:
      if log.exists() and f'"step": {wanted // 200 * 200 + 200}' in (
        log.read_text()
      ):
        break
      time.sleep(0.002)
    if process.poll() is None:
      process.send_signal(signal.SIGKILL)
      kills += 1
    process.wait()
    assert rows(killed)[-1]['step'] < 4000
  assert kills == 3
  subprocess.run(
    command(store, killed), check=True, env=environment, capture_output=True
  )
  for average in (True, False):
    assert_same_bits(
      checkpoint.load(killed, average=average).sae,
      checkpoint.load(whole, average=average).sae,
    )
  assert rows(killed) == rows(whole)
