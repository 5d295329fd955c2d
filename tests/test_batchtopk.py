"""BatchTopK: one threshold a batch, the same on every mesh, kept by a run."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from sae_jax import autoencoder, checkpoint, errors
from sae_jax import mesh as mesh_lib
from sae_jax.autoencoder.nonlinearity import batchtopk
from sae_jax.training import objective, step, train
from sae_jax.training import run as run_lib
from sae_jax.training import state as state_lib
from tests import (
  dense_reference,
  planted,
  runs,
  test_objective,
  test_step,
)

pytestmark = pytest.mark.fast


def config():
  """A run in which AuxK and clipping take part."""
  made = test_step.config()
  return dataclasses.replace(
    made, sae=dataclasses.replace(made.sae, activation='batchtopk')
  )


def values(kind):
  """Pre-activations, and how many of them are wanted."""
  rng = np.random.default_rng(4)
  pre_BN = rng.standard_normal((24, 40)).astype(np.float32)
  if kind == 'ties':
    pre_BN = np.round(pre_BN, 1)
  elif kind == 'few are positive':
    pre_BN = np.where(rng.random(pre_BN.shape) < 0.05, pre_BN, -1)
  elif kind == 'no numbers':
    pre_BN[3, 5:9], pre_BN[7, 7] = np.nan, np.inf
  elif kind == 'none is positive':
    pre_BN = -np.abs(pre_BN)
  elif kind == 'tiny':
    pre_BN *= np.float32(1e-30)
  return pre_BN.astype(np.float32), 24 * 4


def by_sorting(pre_BN, n_active):
  positive = np.sort(pre_BN[pre_BN > 0])[::-1]
  return positive[:n_active][-1] if len(positive) else np.inf


KINDS = (
  'plain', 'ties', 'few are positive', 'no numbers', 'none is positive', 'tiny',
)  # fmt: skip


@pytest.mark.parametrize('kind', KINDS)
def test_the_smallest_active_value_is_that_of_a_sort(kind):
  pre_BN, n_active = values(kind)
  find = jax.jit(batchtopk.smallest_active, static_argnums=1)
  for n in (1, n_active, pre_BN.size):
    assert find(pre_BN, n) == by_sorting(pre_BN, n)
  with jax.enable_x64(True):
    wide_BN = jnp.asarray(pre_BN, jnp.float64) * (1 + 1e-12)
    got = find(wide_BN, n_active)
    assert got == by_sorting(np.asarray(wide_BN), n_active)
  # Control: the next one is another value, unless there is a reason.
  if kind in ('plain', 'no numbers', 'tiny'):
    assert find(pre_BN, n_active) != by_sorting(pre_BN, n_active + 1)


def sharded(pre_BN, n_active, shape, axes=mesh_lib.AXES):
  """The value that each device of a mesh finds."""
  find = jax.shard_map(
    lambda pre_BN: batchtopk.smallest_active(pre_BN, n_active, axes)[None],
    mesh=test_step.make_mesh(*shape),
    in_specs=P(*mesh_lib.AXES),
    out_specs=P(mesh_lib.AXES),
    check_vma=False,
  )
  return np.asarray(jax.jit(find)(pre_BN))


@pytest.mark.parametrize('shape', test_step.MESHES)
def test_devices_agree_on_the_value_of_the_whole_batch(shape):
  for kind in KINDS:
    pre_BN, n_active = values(kind)
    want = by_sorting(pre_BN, n_active)
    np.testing.assert_array_equal(sharded(pre_BN, n_active, shape), want)
  # Control: what devices find by themselves are other values.
  pre_BN, n_active = values('plain')
  alone = sharded(pre_BN, n_active // 8, shape, axes=())
  assert (alone != by_sorting(pre_BN, n_active)).sum() >= 7


def test_counts_that_pass_an_int32_are_exact(monkeypatch):
  # As 2^17 devices would count: of limbs that are two bits long.
  monkeypatch.setattr(batchtopk, '_LIMB', 2)
  pre_BN, n_active = values('plain')
  got = sharded(pre_BN, n_active, (2, 4))
  np.testing.assert_array_equal(got, by_sorting(pre_BN, n_active))
  large = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
  with pytest.raises(errors.UserError, match='65536 tokens x 32768 latents'):
    jax.eval_shape(lambda a: batchtopk.smallest_active(a, 5), large)


@pytest.mark.parametrize('micro_batches', [1, 2, 5])
def test_gradients_equal_dense_autodiff(micro_batches):
  with jax.enable_x64(True):
    sae, x_BD, dead_N = test_objective.problem()
    k = test_objective.CONFIG.k
    sae_config = dataclasses.replace(
      test_objective.CONFIG, activation='batchtopk'
    )
    value, terms, grads = test_objective.ours(
      sae, x_BD, dead_N, sae_config=sae_config, micro_batches=micro_batches
    )
    args = sae, x_BD, dead_N
    want, (nmse, aux), want_grads = test_objective.dense(
      *args, codes=dense_reference.batch_codes
    )
    np.testing.assert_allclose(value, want, rtol=1e-12)
    np.testing.assert_allclose(terms.nmse, nmse, rtol=1e-12)
    np.testing.assert_allclose(terms.aux, aux, rtol=1e-12)
    assert float(aux) > 0 and terms.l0 == k
    assert test_objective.largest_difference(grads, want_grads) < 1e-10
    pre_BN = autoencoder.pre_activations(sae_config, sae, x_BD)
    fired_BN = dense_reference.batch_codes(pre_BN, k) > 0
    np.testing.assert_array_equal(terms.fired_N, fired_BN.any(0))
    np.testing.assert_allclose(
      terms.observed['threshold'], by_sorting(np.asarray(pre_BN), 20 * k)
    )
    # Control: k of every token, or of each half of the batch, is another loss.
    assert len(set((np.asarray(fired_BN).sum(1)).tolist())) > 1
    _, _, other = test_objective.dense(*args)
    assert test_objective.largest_difference(grads, other) > 1e-4
    halves = [
      test_objective.dense(
        sae, half_BD, dead_N, codes=dense_reference.batch_codes
      )[2]
      for half_BD in (x_BD[:10], x_BD[10:])
    ]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    assert test_objective.largest_difference(grads, mean) > 1e-4


def trained_on(state, made, shape, rows_BD):
  """Which latents a step on a mesh trains for each token."""
  where = test_step.make_mesh(*shape)
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
  return test_step.run(config(), (1, 1))


@pytest.mark.parametrize('shape', test_step.MESHES)
def test_a_mesh_changes_nothing_but_rounding(unsharded, shape):
  got = test_step.run(config(), shape)
  test_step.assert_same_run(got, unsharded)
  assert max(row['aux'] for row in unsharded[0]) > 0
  # k of each token on average, to the pair, and not of each token.
  assert all(row['l0'] == 4 for row in got[0])
  rows_BD = test_step.ROWS[:64]
  first, second = (
    trained_on(unsharded[3], config(), s, rows_BD) for s in ((1, 1), shape)
  )
  np.testing.assert_array_equal(first, second)
  assert first.sum() == 4 * 64 and len(set(first.sum(1).tolist())) > 1
  for a, b in zip(
    jax.tree.leaves(got[3].sae), jax.tree.leaves(unsharded[3].sae)
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_micro_batches_change_nothing_but_rounding(unsharded):
  parts = dataclasses.replace(config(), micro_batches=4)
  test_step.assert_same_run(test_step.run(parts, (2, 4)), unsharded)


def test_control_a_value_of_each_shard_is_another_run(monkeypatch, unsharded):
  whole = batchtopk.smallest_active

  def alone(pre_BN, n_active, axes=()):
    shards = jax.lax.axis_size(axes) if axes else 1
    smallest = whole(pre_BN, n_active // shards)
    # One of them for all, so that types are the same.
    return jax.lax.pmin(smallest, axes) if axes else smallest

  monkeypatch.setattr(batchtopk, 'smallest_active', alone)
  step._program.cache_clear()
  got = test_step.run(config(), (2, 4))
  step._program.cache_clear()
  with pytest.raises(AssertionError):
    test_step.assert_same_run(got, unsharded)


def test_the_threshold_follows_the_steps_that_are_taken():
  made = dataclasses.replace(config(), on_nonfinite='skip')
  where = test_step.make_mesh(1, 1)
  state = state_lib.init_state(made, where, test_step.ROWS[:500])
  x_BD, _ = autoencoder.preprocess(made.sae, state.sae, test_step.ROWS[:500])
  pre_BN = np.asarray(autoencoder.pre_activations(made.sae, state.sae, x_BD))
  threshold = float(state.sae.extra['threshold'])
  np.testing.assert_allclose(threshold, by_sorting(pre_BN, 2000), rtol=1e-4)
  do = step.make_step(made, where)
  bad_BD = test_step.ROWS[:64].copy()
  bad_BD[3] = np.nan
  for i in range(4):
    rows_BD = test_step.ROWS[64 * i :][:64]
    x_BD, _ = autoencoder.preprocess(made.sae, state.sae, rows_BD)
    pre_BN = np.asarray(autoencoder.pre_activations(made.sae, state.sae, x_BD))
    state, seen = do(state, rows_BD)
    smallest = by_sorting(pre_BN, 4 * 64)
    np.testing.assert_allclose(seen['threshold'], smallest, rtol=1e-4)
    threshold = 0.99 * threshold + 0.01 * smallest
    state, skipped = do(state, bad_BD)
    assert not skipped['finite']
    got = float(state.sae.extra['threshold'])
    np.testing.assert_allclose(got, threshold, rtol=1e-5)
  # Tokens are encoded by it alone: one by one as all together.
  vals_BN, idx_BN = autoencoder.encode(made.sae, state.sae, x_BD)
  pre_BN = np.asarray(autoencoder.pre_activations(made.sae, state.sae, x_BD))
  want_BN = np.where(pre_BN > got, pre_BN, 0)
  np.testing.assert_allclose(vals_BN, want_BN, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(idx_BN, np.tile(np.arange(64), (64, 1)))
  one_BN, _ = autoencoder.encode(made.sae, state.sae, x_BD[:1])
  np.testing.assert_allclose(one_BN, vals_BN[:1], rtol=1e-5, atol=1e-6)


def test_weights_that_are_no_numbers_reach_the_loss():
  sae, x_BD, dead_N = test_objective.problem()
  sae_config = dataclasses.replace(
    test_objective.CONFIG, activation='batchtopk'
  )
  value, _, _ = test_objective.ours(sae, x_BD, dead_N, sae_config=sae_config)
  assert np.isfinite(value)
  spoilt = sae.replace(w_enc_ND=sae.w_enc_ND.at[7, 2].set(jnp.nan))
  value, _, _ = test_objective.ours(spoilt, x_BD, dead_N, sae_config=sae_config)
  assert np.isnan(value)


def run_config(**kwargs):
  made = runs.train_config(**kwargs)
  return dataclasses.replace(
    made, sae=dataclasses.replace(made.sae, activation='batchtopk')
  )


@pytest.fixture(scope='module')
def finished(store, tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp('runs') / 'whole')
  state = train.train(run_config(), store, workdir)
  runs.assert_active(workdir)
  return workdir, state


def test_stopped_and_resumed_is_uninterrupted(
  finished, store, tmp_path, monkeypatch
):
  resumed, forgetful = str(tmp_path / 'run'), str(tmp_path / 'other')
  for workdir in (resumed, forgetful):
    runs.break_off(17, {workdir: run_config()}, store)
  state = train.train(run_config(), store, resumed)
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
  train.train(run_config(), store, forgetful)
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


def test_codes_of_a_run_have_k_active_latents_on_average(store, tmp_path):
  workdir = str(tmp_path / 'run')
  train.train(run_config(steps=400, log_every=50), store, workdir)
  trained = checkpoint.load(workdir, average=False)
  rows_BD = planted.activations(4000)[-2000:]
  x_BD, _ = autoencoder.preprocess(trained.config, trained.sae, rows_BD)
  vals_BN, _ = autoencoder.encode(trained.config, trained.sae, x_BD)
  active_B = (np.asarray(vals_BN) > 0).sum(1)
  assert abs(active_B.mean() - 4) < 0.5 and np.ptp(active_B) > 2


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'multi_topk': 2}, 'multi_topk 2 needs topk, the activation is batchtopk'),
    ({'topk_recall': 0.9}, 'topk_recall 0.9 needs topk'),
    ({'sparsity_weight': 0.1}, 'does nothing with batchtopk, whose k sets'),
  ],
)
def test_terms_that_do_not_fit_are_refused(options, message):
  with pytest.raises(errors.UserError, match=message):
    objective.check(config().sae, objective.ObjectiveConfig(**options))
