"""Training runs on meshes: they resume to the bit, in one process or two."""

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import checkpoint, errors
from sae_jax.storage import claim
from sae_jax.training import log, run, train
from tests.support import planted, processes, runs


@pytest.fixture(scope='module')
def finished(store, tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp('runs') / 'whole')
  state = train.train(runs.train_config(), store, workdir)
  runs.assert_active(workdir)
  return workdir, state


def test_stopped_and_resumed_is_uninterrupted(
  finished, store, tmp_path, monkeypatch
):
  workdir = str(tmp_path / 'run')
  config = runs.train_config()

  # As after a SIGKILL: nothing is written on the way out.
  monkeypatch.setattr(log.Writer, 'close', lambda self: None)
  runs.break_off(17, {workdir: config}, store)
  monkeypatch.undo()
  assert checkpoint.load(workdir).step == 10
  state = train.train(config, store, workdir)
  runs.assert_same_bits(state, finished[1])
  assert runs.log(workdir) == runs.log(finished[0])


@pytest.mark.parametrize('lost', ['sae', 'adam', 'ema', 'silent_N'])
def test_control_a_part_that_is_not_restored_is_seen(
  finished, store, tmp_path, monkeypatch, lost
):
  workdir, config = str(tmp_path / 'run'), runs.train_config()
  runs.break_off(17, {workdir: config}, store)
  whole = run.restore

  def forgets(*args):
    state = whole(*args)
    saved = run.contents(state)
    parts = vars(saved) | saved.progress
    nothing = jax.tree.map(jnp.zeros_like, parts[lost])
    if lost in ('adam', 'ema'):
      nothing = state.optimizer._replace(**{lost: nothing})
      return state.replace(optimizer=nothing)
    return state.replace(**{lost: nothing})

  monkeypatch.setattr(run, 'restore', forgets)
  train.train(config, store, workdir)
  with pytest.raises(AssertionError):
    runs.assert_same_run(workdir, finished[0])


def test_resume_on_another_mesh(finished, store, tmp_path):
  workdir = str(tmp_path / 'run')
  runs.break_off(17, {workdir: runs.train_config()}, store)
  # Where a run lies and what it tells may change, nothing else.
  other = runs.train_config(mesh_data=2, mesh_latent=4, log_every=3)
  state = train.train(other, store, workdir)
  assert state.sae.w_enc_ND.sharding.shard_shape((64, 16)) == (16, 16)
  for got, want in zip(
    jax.tree.leaves(state.sae), jax.tree.leaves(finished[1].sae)
  ):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_misfits_are_refused(store, tmp_path):
  def refused(message, **kwargs):
    with pytest.raises(errors.UserError, match=message):
      train.train(runs.train_config(**kwargs), store, str(tmp_path / 'none'))

  sae = runs.train_config().sae
  refused(
    'd_model 24 is not the width 16 of the store: use --d_model=16',
    sae=dataclasses.replace(sae, d_model=24),
  )
  refused(
    r'n_latents 60 must be a multiple of the latent axis \(8\): use 64',
    sae=dataclasses.replace(sae, n_latents=60),
  )
  refused(
    r'batch_size 63 must be a multiple of the data axis \(2\) times '
    r'micro_batches \(1\): use 64',
    batch_size=63, mesh_data=2, mesh_latent=4,
  )  # fmt: skip
  refused(r'warmup_steps 50 \+ decay_steps 0 exceed the 30 steps',
    optimizer=dataclasses.replace(
      runs.train_config().optimizer, warmup_steps=50
    ),
  )  # fmt: skip
  assert not (tmp_path / 'none').exists()


def alone_or_together(folder):
  """Trains in a workdir that is relative, so that folders are as hosts."""
  os.chdir(folder)
  store = str(pathlib.Path(folder).parent / 'store')
  config = runs.train_config(steps=4, mesh_data=2, mesh_latent=4)
  try:
    state = train.train(config, store, 'run')
    print('trained to', state.step)
  except errors.UserError as error:
    print(error)


def test_processes_that_do_not_share_the_workdir_are_refused(tmp_path):
  planted.write_store(str(tmp_path / 'store'))
  for name in '01':
    (tmp_path / name).mkdir()
  code = 'import sys; from tests.mesh import test_train as t; '
  code += 't.alone_or_together(sys.argv[1])'
  said = processes.run_two(code, [tmp_path / '0', tmp_path / '1'])
  for text in said:
    assert 'workdir run is local to a host: 1 of 2 processes do not' in text
  assert list((tmp_path / '0').rglob('*')) == [tmp_path / '0' / 'run']
  assert not list((tmp_path / '1').iterdir())
  # One that another process has is refused on both; none waits for the other.
  with claim.claim(str(tmp_path / '0' / 'run')):
    said = processes.run_two(code, [tmp_path / '0', tmp_path / '0'])
  assert 'run is in use by another process' in said[0]
  assert 'process 0 cannot use workdir run: see what it says' in said[1]
  # Control: the same where both see one folder.
  said = processes.run_two(code, [tmp_path / '0', tmp_path / '0'])
  assert all('trained to 4' in text for text in said)
  assert runs.saved_steps(tmp_path / '0' / 'run') == [4]
  assert not list((tmp_path / '0' / 'run').glob('.seen*'))


@pytest.mark.parametrize(
  'flags',
  [
    # The latents over all eight devices of two hosts.
    {'steps': 60, 'checkpoint_every': 20, 'mesh_latent': 8},
    # Each host has half of the tokens, and reads a lane of its own.
    {'steps': 40, 'mesh_latent': 4, 'lanes': 2},
  ],
)
def test_two_processes_train_what_one_does(store, tmp_path, flags):
  """Two hosts with four devices each."""
  two, one = str(tmp_path / 'two'), str(tmp_path / 'one')
  both = runs.start_two(runs.command(store, two, **flags))
  for process in both:
    runs.ended(process)
  runs.run(runs.command(store, one, **flags), devices=8)
  got, want = runs.rows(two), runs.rows(one)
  assert [row['step'] for row in got] == [row['step'] for row in want]
  runs.assert_active(one)
  for a, b in zip(got, want):
    for name in b:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-8)
  for a, b in zip(
    jax.tree.leaves(checkpoint.load(two).sae),
    jax.tree.leaves(checkpoint.load(one).sae),
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
