"""The training step: equal on every mesh, and equal to a dense loop."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from sae_jax import autoencoder, errors, mesh
from sae_jax.ops import varying
from sae_jax.training import auxk, evaluation, optimizer, step
from sae_jax.training import state as state_lib
from tests import dense_reference, planted, processes

pytestmark = pytest.mark.fast

STEPS = 20
MESHES = [(8, 1), (1, 8), (2, 4), (4, 2)]
ROWS = planted.activations(3000)


def config():
  """A run with AuxK and clipping taking part."""
  made = planted.train_config(steps=STEPS)
  return dataclasses.replace(
    made,
    # Dead after a few steps; k_aux is more than a shard of 1x8 has latents.
    objective=dataclasses.replace(
      made.objective, dead_after_tokens=3 * 64, k_aux=20
    ),
    optimizer=dataclasses.replace(made.optimizer, clip_norm=0.25),
  )


def batches(config, rows):
  for i in range(config.steps):
    start = i * config.batch_size
    yield rows[start : start + config.batch_size]


def make_mesh(data, latent):
  return jax.make_mesh(
    (data, latent),
    mesh.AXES,
    axis_types=(AxisType.Auto,) * 2,
    devices=jax.devices()[: data * latent],
  )


def selection(config, made):
  """A jitted function to which latents a state selects for each token."""

  def chosen(sae, x_BD):
    vals_BK, idx_BK = autoencoder.encode(config.sae, sae, x_BD, axis='latent')
    rows_B1 = jnp.arange(x_BD.shape[0])[:, None]
    none_BN = varying.zeros(
      (x_BD.shape[0], sae.w_enc_ND.shape[0]), bool, vals_BK
    )
    return none_BN.at[rows_B1, idx_BK].max(vals_BK > 0)

  specs = mesh.specs(state_lib.abstract_sae(config.sae))
  rule = mesh.RULES.spec
  shards = jax.shard_map(
    chosen, mesh=made, in_specs=(specs, rule('BD')), out_specs=rule('BN')
  )

  def select(sae, raw_BD):
    x_BD, _ = autoencoder.preprocess(config.sae, sae, raw_BD)
    return shards(sae, x_BD)

  return jax.jit(select, out_shardings=mesh.sharding(made, ''))


def run(config, shape, rows=ROWS, implementation=None):
  """A few steps on a mesh: values, selected latents, silence, last state."""
  made = make_mesh(*shape)
  state = state_lib.init_state(config, made, rows[:500])
  do = step.make_step(config, made, implementation)
  select = selection(config, made)
  values, selected, silent = [], [], []
  whole = jax.jit(lambda a: a, out_shardings=mesh.sharding(made, ''))
  for raw_BD in batches(config, rows):
    placed = jax.make_array_from_callback(
      raw_BD.shape, mesh.sharding(made, 'BD'), lambda i, a=raw_BD: a[i]
    )
    selected.append(np.asarray(select(state.sae, placed)))
    state, found = do(state, placed)
    values.append({name: float(v) for name, v in found.items()})
    silent.append(np.asarray(whole(state.silent_N)))
  return values, np.array(selected), np.array(silent), state


def assert_same_run(got, want):
  """The same latents exactly, the same values to rounding."""
  np.testing.assert_array_equal(got[1], want[1])
  np.testing.assert_array_equal(got[2], want[2])
  for a, b in zip(got[0], want[0], strict=True):
    for name in b:
      np.testing.assert_allclose(
        a[name], b[name], rtol=1e-5, atol=1e-12, err_msg=name
      )


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


@pytest.mark.parametrize('activation', ['relu', 'jumprelu'])
def test_baselines_are_the_same_on_a_mesh(config, activation):
  made = dataclasses.replace(
    config,
    sae=dataclasses.replace(config.sae, activation=activation),
    objective=dataclasses.replace(
      config.objective, sparsity_weight=0.05, jump_bandwidth=0.1
    ),
  )
  want = run(made, (1, 1))
  assert_same_run(run(made, (2, 4)), want)
  assert want[0][-1]['loss'] < want[0][0]['loss']
  if activation == 'jumprelu':
    last_N = np.asarray(want[3].sae.log_threshold_N)
    assert np.ptp(last_N) > 0


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


def test_rates_follow_the_schedule_from_the_first_step(config):
  made = make_mesh(1, 1)
  plan = dataclasses.replace(
    config.optimizer, warmup_steps=4, decay_steps=4, learning_rate=1e-3
  )
  values, *_ = run(
    dataclasses.replace(config, optimizer=plan, steps=STEPS), (1, 1)
  )
  del made
  rates = [row['learning_rate'] for row in values]
  np.testing.assert_allclose(
    rates[:5], [2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3], rtol=1e-6
  )
  np.testing.assert_allclose(
    rates[-4:], [1e-3, 7.5e-4, 5e-4, 2.5e-4], rtol=1e-6
  )


def test_micro_batches_take_less_memory(config):
  made = make_mesh(1, 1)
  wide = dataclasses.replace(
    config,
    sae=dataclasses.replace(config.sae, n_latents=1024, k=32),
    batch_size=1024,
  )
  sizes = []
  for parts in (1, 8):
    some = dataclasses.replace(wide, micro_batches=parts)
    args = [
      state_lib.abstract_state(some, made),
      jax.ShapeDtypeStruct((1024, 16), jnp.float32),
      jax.ShapeDtypeStruct((), jnp.float32),
    ]
    program = step._program(some, made, None, False).lower(*args).compile()
    sizes.append(program.memory_analysis().temp_size_in_bytes)
  assert sizes[1] < 0.6 * sizes[0]


def test_a_gradient_that_is_not_finite_is_skipped_though_the_loss_is(config):
  made = make_mesh(1, 1)
  raw = dataclasses.replace(
    config,
    on_nonfinite='skip',
    sae=dataclasses.replace(config.sae, preprocessing='none'),
  )
  state = state_lib.init_state(raw, made, ROWS[:500])
  bad_BD = ROWS[:64].copy()
  bad_BD[5] *= 1e13
  state, values = step.make_step(raw, made)(state, bad_BD)
  assert np.isfinite(values['loss']) and not np.isfinite(values['grad_norm'])
  assert not values['finite'] and int(state.skipped) == 1
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(state.sae))


def test_rows_that_are_all_equal_are_refused(config):
  with pytest.raises(
    errors.UserError, match='variance of the first 9 rows is 0: th'
  ):
    state_lib.init_state(config, make_mesh(1, 1), np.ones((9, 16), np.float32))


@pytest.mark.slow
def test_two_processes_select_the_same_latents(unsharded, tmp_path):
  code = (
    'import pickle, sys; from tests import test_step as t; '
    'found = t.run(t.config(), (2, 4)); '
    'print(len(t.jax.local_devices()), "of", len(t.jax.devices())); '
    'pickle.dump(found[:3], open(sys.argv[1], "wb"))'
  )
  said = processes.run_two(code, [tmp_path / '0', tmp_path / '1'])
  assert all('4 of 8' in text for text in said)
  for number in '01':
    with open(tmp_path / number, 'rb') as file:
      assert_same_run(pickle.load(file), unsharded)


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


def test_runs_that_differ_in_seed_and_rate_share_a_program(config):
  made = make_mesh(1, 1)
  before = step._program.cache_info().misses
  other = dataclasses.replace(
    config,
    seed=7,
    optimizer=dataclasses.replace(config.optimizer, learning_rate=0.1),
  )
  first = step.make_step(config, made)
  second = step.make_step(other, made)
  assert step._program.cache_info().misses <= before + 1
  state = state_lib.init_state(config, made, ROWS[:500])
  copy = jax.tree.map(jnp.copy, state)
  rates = [float(do(s, ROWS[:64])[1]['learning_rate']) for do, s in
           ((first, state), (second, copy))]  # fmt: skip
  np.testing.assert_allclose(rates, [3e-3, 0.1], rtol=1e-6)


def test_steps_equal_a_dense_loop_in_float64(config):
  """The step's parts, composed, against autodiff of the dense objective."""
  # Silent for one batch is dead, so that AuxK takes part at most steps.
  aux = dataclasses.replace(config.objective, dead_after_tokens=64)
  config = dataclasses.replace(config, objective=aux)
  with jax.enable_x64(True):
    sae = jax.tree.map(
      lambda a: jnp.asarray(np.asarray(a), jnp.float64),
      state_lib.init_state(config, make_mesh(1, 1), ROWS[:500]).sae,
    )
    mse_of_mean, rate = 0.5, config.optimizer.learning_rate
    dead_after = config.objective.dead_after_tokens
    states, aux_seen = [], []
    for dense in (False, True):
      one = make_mesh(1, 1)
      state = state_lib.TrainState(
        sae=jax.tree.map(jnp.copy, sae),
        optimizer=optimizer.init(config.optimizer, sae),
        silent_N=jnp.zeros(64, jnp.int32),
        mse_of_mean=jnp.asarray(mse_of_mean),
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
      )
      do = step.make_step(config, one)
      for raw_BD in batches(config, ROWS):
        raw_BD = jnp.asarray(raw_BD, jnp.float64)
        if not dense:
          state, values = do(state, raw_BD)
          aux_seen.append(float(values['aux']))
          continue
        x_BD, _ = autoencoder.preprocess(config.sae, state.sae, raw_BD)
        dead_N = state.silent_N >= dead_after
        grads = jax.grad(dense_reference.loss, has_aux=True)(
          state.sae, x_BD, dead_N, mse_of_mean, 4, 20, 1 / 32
        )[0]
        pre_BN = (x_BD - state.sae.b_pre_D) @ state.sae.w_enc_ND.T
        fired = dense_reference.codes(pre_BN + state.sae.b_lat_N, 4) > 0
        new, opt, _ = optimizer.update(
          config.optimizer, state.sae, state.optimizer, grads, rate
        )
        state = state.replace(
          sae=new,
          optimizer=opt,
          step=state.step + 1,
          silent_N=jnp.where(fired.any(0), 0, state.silent_N + len(raw_BD)),
        )
      states.append(state)
    np.testing.assert_array_equal(states[0].silent_N, states[1].silent_N)
    assert np.count_nonzero(aux_seen) > STEPS // 2
    for got, want in zip(*(jax.tree.leaves(s.sae) for s in states)):
      np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_silence_saturates(config):
  made = make_mesh(1, 1)
  state = state_lib.init_state(config, made, ROWS[:500])
  state = state.replace(silent_N=jnp.full(64, 2**31 - 10, jnp.int32))
  state, values = step.make_step(config, made)(state, ROWS[:64])
  silent_N = np.asarray(state.silent_N)
  assert float(values['dead_fraction']) == 1
  assert ((silent_N == 0) | (silent_N == 2**31 - 1)).all()
  assert (silent_N > 0).any()


def test_abstract_state_is_that_of_a_real_one(config):
  made = make_mesh(2, 4)
  real = state_lib.init_state(config, made, ROWS[:500])
  for a, b in zip(
    jax.tree.leaves(state_lib.abstract_state(config, made)),
    jax.tree.leaves(real),
  ):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_initial_weights_do_not_depend_on_the_mesh(config):
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
    average = optimizer.averaged(
      config.optimizer, state.sae, state.optimizer.ema
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
