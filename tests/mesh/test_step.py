"""The training step is the same on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import autoencoder, mesh
from sae_jax.training import auxk, evaluation, step
from sae_jax.training import state as state_lib
from tests.support import planted
from tests.support.step_runs import (
  assert_same_run,
  config,
  make_mesh,
  ROWS,
  run,
  STEPS,
)

MESHES = [(8, 1), (1, 8), (2, 4), (4, 2)]


@pytest.fixture(name='config', scope='module')
def config_fixture():
  return config()


@pytest.fixture(scope='module')
def unsharded(config):
  return run(config, (1, 1))


@pytest.mark.parametrize('shape', MESHES)
def test_a_mesh_changes_nothing_but_rounding(config, unsharded, shape):
  got = run(config, shape)
  assert_same_run(got, unsharded)
  assert max(row['aux'] for row in unsharded[0]) > 0
  clipped = [row['grad_norm'] > 0.25 for row in unsharded[0]]
  assert any(clipped)
  assert got[1].sum() == 4 * 64 * STEPS
  for a, b in zip(
    jax.tree.leaves(got[3].sae), jax.tree.leaves(unsharded[3].sae)
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  per_shard = got[3].sae.w_enc_ND.sharding.shard_shape((64, 16))
  assert per_shard == (64 // shape[1], 16)
  moments = got[3].optimizer.adam.mu['w_dec_ND']
  assert moments.sharding.shard_shape((64, 16)) == per_shard


@pytest.mark.parametrize(
  'activation', ['relu', 'jumprelu', 'gated', 'groupmax']
)
def test_baselines_are_the_same_on_a_mesh(config, activation):
  made = dataclasses.replace(
    config,
    sae=dataclasses.replace(config.sae, activation=activation),
    objective=dataclasses.replace(
      config.objective,
      sparsity_weight=0.05 * (activation != 'groupmax'),
      jump_bandwidth=0.1,
    ),
  )
  want = run(made, (1, 1))
  assert_same_run(run(made, (2, 4)), want)
  assert want[0][-1]['loss'] < want[0][0]['loss']
  if activation == 'jumprelu':
    last_N = np.asarray(want[3].sae.extra['log_threshold_N'])
    assert np.ptp(last_N) > 0


def test_a_transcoder_is_the_same_on_a_mesh(config):
  made = dataclasses.replace(
    config,
    sae=dataclasses.replace(
      config.sae, target_site='blocks.0.mlp_out', skip=True
    ),
  )
  rows = np.concatenate([ROWS, planted.targets(ROWS)], axis=1)
  want = run(made, (1, 1), rows)
  assert_same_run(run(made, (2, 4), rows), want)
  assert max(row['aux'] for row in want[0]) > 0
  skip_DD = np.asarray(want[3].sae.target['w_skip_DD'])
  assert np.abs(skip_DD).max() > 1e-3
  # Control: without it the run is another.
  plain = dataclasses.replace(
    made, sae=dataclasses.replace(made.sae, skip=False)
  )
  assert (
    abs(run(plain, (1, 1), rows)[0][-1]['loss'] - want[0][-1]['loss']) > 1e-3
  )


@pytest.mark.parametrize('multi_topk', [0, 2])
def test_micro_batches_change_nothing_but_rounding(config, multi_topk):
  made = dataclasses.replace(
    config,
    objective=dataclasses.replace(config.objective, multi_topk=multi_topk),
  )
  want = run(made, (1, 1))
  parts = dataclasses.replace(made, micro_batches=4)
  assert_same_run(run(parts, (1, 1)), want)
  assert_same_run(run(parts, (2, 4)), want)


@pytest.mark.parametrize('shape', MESHES)
def test_dead_latents_that_crowd_a_shard_are_all_seen(
  config, monkeypatch, shape
):
  """Some shards have none, one has most: AuxK's size must hold them."""
  monkeypatch.setattr(auxk, '_sizes', lambda n: [1, 3, 5, n])
  step._program.cache_clear()
  many = dataclasses.replace(
    config, objective=dataclasses.replace(config.objective, aux_weight=100.0)
  )
  silent_N = np.zeros(64, np.int32)
  silent_N[[8, 9, 10, 63]] = 1000
  found = []
  for one in ((1, 1), shape):
    made = make_mesh(*one)
    state = state_lib.init_state(many, made, ROWS[:500])
    state = state.replace(
      silent_N=jax.device_put(silent_N, mesh.sharding(made, 'N'))
    )
    state, values = step.make_step(many, made)(state, ROWS[:64])
    found.append((float(values['loss']), float(values['grad_norm'])))
    assert float(values['dead_fraction']) == 4 / 64 and values['aux'] > 0
  np.testing.assert_allclose(*found, rtol=1e-5)
  monkeypatch.undo()
  step._program.cache_clear()


@pytest.mark.parametrize('spoilt', [np.nan, np.inf])
def test_a_step_that_is_not_finite_is_skipped(config, spoilt):
  made = make_mesh(2, 4)
  skipping = dataclasses.replace(config, on_nonfinite='skip')
  do = step.make_step(skipping, made)
  state = state_lib.init_state(skipping, made, ROWS[:500])
  bad_BD = ROWS[:64].copy()
  bad_BD[7, 3] = spoilt
  whole, gaps = state, jax.tree.map(jnp.copy, state)
  for i in range(3):
    placed = ROWS[i * 64 : i * 64 + 64]
    whole, values = do(whole, placed)
    gaps, held = do(gaps, bad_BD)
    assert not held['finite'] and held['skipped'] == i + 1
    gaps, after = do(gaps, placed)
    assert values['finite'] and after['finite'] and values['skipped'] == 0
  # But for the counters, which the schedule goes by, nothing happened.
  assert int(gaps.step) == 6 and int(gaps.skipped) == 3
  for name in ('sae', 'optimizer', 'silent_N'):
    for a, b in zip(
      jax.tree.leaves(getattr(gaps, name)),
      jax.tree.leaves(getattr(whole, name)),
    ):
      np.testing.assert_array_equal(a, b)
  # Control: a step that stops lets it in.
  stopping = step.make_step(config, made)
  state, values = stopping(whole, bad_BD)
  assert not values['finite']
  assert not np.isfinite(state.sae.w_enc_ND).all()


def test_abstract_state_is_that_of_a_real_one(config):
  made = make_mesh(2, 4)
  real = state_lib.init_state(config, made, ROWS[:500])
  for a, b in zip(
    jax.tree.leaves(state_lib.abstract_state(config, made)),
    jax.tree.leaves(real),
  ):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.parametrize('start', ['random', 'data'])
def test_initial_weights_do_not_depend_on_the_mesh(config, start):
  sae = dataclasses.replace(config.sae, decoder_init=start)
  config = dataclasses.replace(config, sae=sae)
  one = state_lib.init_state(config, make_mesh(1, 1), ROWS[:500])
  many = state_lib.init_state(config, make_mesh(2, 4), ROWS[:500])
  np.testing.assert_array_equal(one.sae.w_dec_ND, many.sae.w_dec_ND)
  np.testing.assert_allclose(one.sae.w_enc_ND, many.sae.w_enc_ND, rtol=1e-6)


def test_evaluation_is_of_the_averaged_weights_on_every_mesh(config):
  totals = []
  for shape in ((1, 1), (2, 4)):
    state = run(config, shape)[-1]
    made = make_mesh(*shape)
    placed = jax.device_put(ROWS[-512:], mesh.sharding(made, 'BD'))
    totals.append(evaluation.make_evaluation(config, made)(state, placed))
    ema = state.optimizer.ema
    average = autoencoder.averaged(
      state.sae, ema.ema, ema.count, config.optimizer.ema_decay
    )
    average = jax.tree.map(np.asarray, average)
  for got, want in zip(*(jax.tree.leaves(t) for t in totals)):
    np.testing.assert_allclose(got, want, rtol=1e-4)
  x_BD, _ = autoencoder.preprocess(config.sae, average, ROWS[-512:])
  output_BD = autoencoder.decode(
    average, *autoencoder.encode(config.sae, average, x_BD)
  )
  np.testing.assert_allclose(
    totals[1].error, ((x_BD - output_BD) ** 2).sum(), rtol=1e-4
  )
  assert int(totals[1].tokens) == 512
