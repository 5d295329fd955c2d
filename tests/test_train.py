"""Training runs: they learn, resume to the bit, and refuse what misfits."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
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


class Stop(Exception):
  pass


def break_off(monkeypatch, step):
  """Makes runs stop when they ask for the batch of a step."""
  whole = train.feed.Feed.iterate

  def breaks_off(self, start, stop, *args):
    for number, batch in enumerate(whole(self, start, stop, *args), start):
      if number == step:
        raise Stop
      yield batch

  monkeypatch.setattr(train.feed.Feed, 'iterate', breaks_off)


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

  break_off(monkeypatch, 17)
  # As after a SIGKILL: nothing is written on the way out.
  monkeypatch.setattr(train.metrics.Writer, 'close', lambda self: None)
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
  break_off(monkeypatch, 17)
  with pytest.raises(Stop):
    train.train(planted.train_config(), store, workdir)
  monkeypatch.undo()
  # Where a run lies and what it tells may change, nothing else.
  other = planted.train_config(mesh_data=2, mesh_latent=4, log_every=3)
  state = train.train(other, store, workdir)
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
  refused(r'warmup_steps 50 \+ decay_steps 0 exceed the 30 steps',
    optimizer=dataclasses.replace(
      planted.train_config().optimizer, warmup_steps=50
    ),
  )  # fmt: skip
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
def test_a_store_without_held_out_rows_is_refused_at_once(tmp_path):
  planted.write_store(str(tmp_path / 'store'), holdout_documents=0)
  with pytest.raises(UserError, match='holds 0 rows out, an evaluation needs'):
    train.train(
      planted.train_config(), str(tmp_path / 'store'), str(tmp_path / 'run')
    )


@pytest.mark.fast
def test_held_out_rows_teach_nothing(store, tmp_path):
  """Neither the sample at the start nor a batch may hold them."""
  clean = store_lib.open_store(store)
  rows_RD = clean.read_rows(0, clean.manifest.n_rows)
  rows_RD[clean.n_train :] += 7
  planted.write_store(str(tmp_path / 'other'), rows_RD=rows_RD)
  config = planted.train_config(sample_rows=10**6)
  states = [
    train.train(config, url, str(tmp_path / f'run{i}'))
    for i, url in enumerate((store, str(tmp_path / 'other')))
  ]
  assert_same_bits(*states)


@pytest.mark.fast
def test_a_start_that_failed_does_not_claim_the_workdir(store, tmp_path):
  workdir = str(tmp_path / 'run')
  nothing = dataclasses.replace(planted.train_config().optimizer, adam_b1=0.5)
  monkeypatch = pytest.MonkeyPatch()
  break_off(monkeypatch, 3)
  with pytest.raises(Stop):
    train.train(planted.train_config(optimizer=nothing), store, workdir)
  monkeypatch.undo()
  # No checkpoint was written, so nothing is lost by other settings.
  train.train(planted.train_config(), store, workdir)


@pytest.mark.fast
@pytest.mark.parametrize('part', ['sae', 'adam', '_CHECKPOINT_METADATA'])
def test_a_damaged_checkpoint_is_named(finished, store, tmp_path, part):
  workdir = tmp_path / 'run'
  shutil.copytree(finished[0], workdir)
  folder = workdir / 'checkpoints' / '30'
  if part == '_CHECKPOINT_METADATA':
    (folder / part).write_text('{}')
  else:
    shutil.rmtree(folder / part)
  with pytest.raises(
    UserError, match=r'30 cannot be read .*: delete that fold'
  ):
    train.train(planted.train_config(), store, str(workdir))
  # As told: without it the run goes on from step 20 to the same bits.
  shutil.rmtree(folder)
  assert_same_bits(
    train.train(planted.train_config(), store, str(workdir)), finished[1]
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


@pytest.mark.slow
def test_two_processes_train_what_one_does(store, tmp_path):
  """Two hosts with four devices each, the latents over all eight."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    coordinator = f'127.0.0.1:{free.getsockname()[1]}'
  short = ['--steps=60', '--checkpoint_every=20', '--dead_after_tokens=200']
  environment = os.environ | {
    'TF_CPP_MIN_LOG_LEVEL': '3',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=4',
  }
  both = [
    subprocess.Popen(
      [
        *command(store, str(tmp_path / 'two')),
        *short,
        f'--coordinator={coordinator}',
        '--num_processes=2',
        f'--process_id={number}',
      ],
      env=environment,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number in range(2)
  ]
  for process in both:
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
  one = [*command(store, str(tmp_path / 'one')), *short]
  subprocess.run(one, check=True, capture_output=True)
  got, want = rows(tmp_path / 'two'), rows(tmp_path / 'one')
  assert [row['step'] for row in got] == [row['step'] for row in want]
  for a, b in zip(got, want):
    for name in b:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-8)
  loaded = checkpoint.load(str(tmp_path / 'two'))
  for a, b in zip(
    jax.tree.leaves(loaded.sae),
    jax.tree.leaves(checkpoint.load(str(tmp_path / 'one')).sae),
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_interrupt_is_one_line_and_the_run_goes_on(
  finished, store, tmp_path
):
  process = subprocess.Popen(
    command(store, str(tmp_path / 'run')),
    env=os.environ | {'TF_CPP_MIN_LOG_LEVEL': '3'},
    stderr=subprocess.PIPE,
    text=True,
  )
  saved = tmp_path / 'run' / 'checkpoints' / '200'
  while process.poll() is None and not saved.exists():
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  _, said = process.communicate(timeout=60)
  assert process.returncode == 130
  assert 'Traceback' not in said
  assert said.splitlines()[-1].startswith('error: interrupted')
  assert checkpoint.load(str(tmp_path / 'run')).step >= 200
