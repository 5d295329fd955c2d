"""BatchTopK: the same on every mesh, and kept by a run."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from sae_jax import autoencoder, checkpoint, errors
from sae_jax import mesh as mesh_lib
from sae_jax.autoencoder.nonlinearity import batchtopk
from sae_jax.training import run as run_lib
from sae_jax.training import state as state_lib
from sae_jax.training import step, train
from tests.support import (
  batchtopk_checks,
  runs,
  step_runs,
)

MESHES = [(8, 1), (1, 8), (2, 4), (4, 2)]


def sharded(pre_BN, n_active, shape, axes=mesh_lib.AXES):
  """The value that each device of a mesh finds."""
  find = jax.shard_map(
    lambda pre_BN: batchtopk.smallest_active(pre_BN, n_active, axes)[None],
    mesh=step_runs.make_mesh(*shape),
    in_specs=P(*mesh_lib.AXES),
    out_specs=P(mesh_lib.AXES),
    check_vma=False,
  )
  return np.asarray(jax.jit(find)(pre_BN))


@pytest.mark.parametrize('shape', MESHES)
def test_devices_agree_on_the_value_of_the_whole_batch(shape):
  for kind in batchtopk_checks.KINDS:
    pre_BN, n_active = batchtopk_checks.values(kind)
    want = batchtopk_checks.by_sorting(pre_BN, n_active)
    np.testing.assert_array_equal(sharded(pre_BN, n_active, shape), want)
  # Control: what devices find by themselves are other values.
  pre_BN, n_active = batchtopk_checks.values('plain')
  alone = sharded(pre_BN, n_active // 8, shape, axes=())
  assert (alone != batchtopk_checks.by_sorting(pre_BN, n_active)).sum() >= 7


def test_counts_that_pass_an_int32_are_exact(monkeypatch):
  # As 2^17 devices would count: of limbs that are two bits long.
  monkeypatch.setattr(batchtopk, '_LIMB', 2)
  pre_BN, n_active = batchtopk_checks.values('plain')
  got = sharded(pre_BN, n_active, (2, 4))
  np.testing.assert_array_equal(
    got, batchtopk_checks.by_sorting(pre_BN, n_active)
  )
  large = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
  with pytest.raises(errors.UserError, match='65536 tokens x 32768 latents'):
    jax.eval_shape(lambda a: batchtopk.smallest_active(a, 5), large)


def trained_on(state, made, shape, rows_BD):
  """Which latents a step on a mesh trains for each token."""
  where = step_runs.make_mesh(*shape)
  specs = mesh_lib.specs(state_lib.abstract_sae(made.sae))

  def chosen(sae, x_BD):
    pre_BN = autoencoder.pre_activations(made.sae, sae, x_BD)
    smallest = batchtopk.smallest_active(
      pre_BN, len(rows_BD) * made.sae.k, mesh_lib.AXES
    )
    return pre_BN >= smallest

  rule = mesh_lib.RULES.spec
  shards = jax.shard_map(
    chosen, mesh=where, in_specs=(specs, rule('BD')), out_specs=rule('BN')
  )
  sae = jax.tree.map(np.asarray, state.sae)
  x_BD, _ = autoencoder.preprocess(made.sae, sae, rows_BD)
  return np.asarray(jax.jit(shards)(sae, x_BD))


@pytest.fixture(scope='module')
def unsharded():
  return step_runs.run(batchtopk_checks.config(), (1, 1))


@pytest.mark.parametrize('shape', MESHES)
def test_a_mesh_changes_nothing_but_rounding(unsharded, shape):
  got = step_runs.run(batchtopk_checks.config(), shape)
  step_runs.assert_same_run(got, unsharded)
  assert max(row['aux'] for row in unsharded[0]) > 0
  # k of each token on average, to the pair, and not of each token.
  assert all(row['l0'] == 4 for row in got[0])
  rows_BD = step_runs.ROWS[:64]
  first, second = (
    trained_on(unsharded[3], batchtopk_checks.config(), s, rows_BD)
    for s in ((1, 1), shape)
  )
  np.testing.assert_array_equal(first, second)
  assert first.sum() == 4 * 64 and len(set(first.sum(1).tolist())) > 1
  for a, b in zip(
    jax.tree.leaves(got[3].sae), jax.tree.leaves(unsharded[3].sae)
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_micro_batches_change_nothing_but_rounding(unsharded):
  parts = dataclasses.replace(batchtopk_checks.config(), micro_batches=4)
  step_runs.assert_same_run(step_runs.run(parts, (2, 4)), unsharded)


def test_control_a_value_of_each_shard_is_another_run(monkeypatch, unsharded):
  whole = batchtopk.smallest_active

  def alone(pre_BN, n_active, axes=()):
    shards = jax.lax.axis_size(axes) if axes else 1
    smallest = whole(pre_BN, n_active // shards)
    # One of them for all, so that types are the same.
    return jax.lax.pmin(smallest, axes) if axes else smallest

  monkeypatch.setattr(batchtopk, 'smallest_active', alone)
  step._program.cache_clear()
  got = step_runs.run(batchtopk_checks.config(), (2, 4))
  step._program.cache_clear()
  with pytest.raises(AssertionError):
    step_runs.assert_same_run(got, unsharded)


@pytest.fixture(scope='module')
def finished(store, tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp('runs') / 'whole')
  state = train.train(batchtopk_checks.run_config(), store, workdir)
  runs.assert_active(workdir)
  return workdir, state


def test_stopped_and_resumed_is_uninterrupted(
  finished, store, tmp_path, monkeypatch
):
  resumed, forgetful = str(tmp_path / 'run'), str(tmp_path / 'other')
  for workdir in (resumed, forgetful):
    runs.break_off(17, {workdir: batchtopk_checks.run_config()}, store)
  state = train.train(batchtopk_checks.run_config(), store, resumed)
  runs.assert_same_bits(state, finished[1])
  assert runs.log(resumed) == runs.log(finished[0])
  # Control: a threshold that is not saved is seen.
  whole = run_lib.restore

  def forgets(*args):
    state = whole(*args)
    return state.replace(
      sae=state.sae.replace(extra=jax.tree.map(jnp.zeros_like, state.sae.extra))
    )

  monkeypatch.setattr(run_lib, 'restore', forgets)
  train.train(batchtopk_checks.run_config(), store, forgetful)
  with pytest.raises(AssertionError):
    runs.assert_same_run(forgetful, finished[0])


def test_a_checkpoint_has_the_threshold_beside_the_parameters(finished):
  workdir, state = finished
  average, last = (
    checkpoint.load(workdir, average=average) for average in (True, False)
  )
  for trained in (average, last):
    assert list(trained.sae.extra) == ['threshold']
    got = float(trained.sae.extra['threshold'])
    assert got == float(state.sae.extra['threshold']) > 0
  with checkpoint.open_checkpointer(workdir) as checkpointer:
    saved = checkpointer.checkpointables_metadata(30).metadata
  assert set(saved['sae']) == {
    'w_enc_ND', 'w_dec_ND', 'b_lat_N', 'b_pre_D', 'data_mean_D', 'data_scale',
    'threshold',
  }  # fmt: skip
  # It is not trained: neither moments nor an average of it are kept.
  assert 'threshold' not in saved['ema']['ema']
