"""Training runs on meshes: they resume to the bit, in one process or two."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import checkpoint, errors
from sae_jax.training import log, run, train
from tests.support import runs


@pytest.fixture(scope='module')
def finished(store, tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp('runs') / 'whole')
  state = train.train(runs.train_config(), store, workdir)
  runs.assert_active(workdir)
  return workdir, state


@pytest.fixture(scope='module')
def broken(store, tmp_path_factory):
  """A workdir left as after a SIGKILL: nothing is written on the way out."""
  workdir = str(tmp_path_factory.mktemp('runs') / 'broken')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(log.Writer, 'close', lambda self: None)
    runs.break_off(17, {workdir: runs.train_config()}, store)
  assert checkpoint.load(workdir).step == 10
  return workdir


@pytest.fixture
def workdir(broken, tmp_path):
  """A copy of it."""
  return str(shutil.copytree(broken, tmp_path / 'run'))


def test_stopped_and_resumed_is_uninterrupted(finished, store, workdir):
  state = train.train(runs.train_config(), store, workdir)
  runs.assert_same_bits(state, finished[1])
  assert runs.log(workdir) == runs.log(finished[0])


@pytest.mark.parametrize('lost', ['sae', 'adam', 'ema', 'silent_N'])
def test_control_a_part_that_is_not_restored_is_seen(
  finished, store, workdir, monkeypatch, lost
):
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
  train.train(runs.train_config(), store, workdir)
  with pytest.raises(AssertionError):
    runs.assert_same_run(workdir, finished[0])


def test_resume_on_another_mesh(finished, store, workdir):
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
    r'n_latents 60 must be a multiple of the latent axis \(8\): use '
    '--n_latents=64',
    sae=dataclasses.replace(sae, n_latents=60),
  )
  refused(
    r'batch_size 64 must be a multiple of the data axis \(2\) times '
    r'micro_batches \(3\): use --batch_size=66',
    batch_size=64, micro_batches=3, mesh_data=2, mesh_latent=4,
  )  # fmt: skip
  refused(r'warmup_steps 50 \+ decay_steps 0 exceed the 30 steps',
    optimizer=dataclasses.replace(
      runs.train_config().optimizer, warmup_steps=50
    ),
  )  # fmt: skip
  assert not (tmp_path / 'none').exists()
