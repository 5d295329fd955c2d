"""The training step: equal to a dense loop, and what it tells."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import autoencoder, errors
from sae_jax.training import optimizer, step
from sae_jax.training import state as state_lib
from tests.support import dense_reference, programs
from tests.support.step_runs import batches, config, make_mesh, ROWS, run, STEPS


@pytest.fixture(name='config', scope='module')
def config_fixture():
  return config()


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
    lowered = step._program(some, made, None, False).lower(*args)
    program = lowered.compile(compiler_options=programs.QUICKLY)
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
    errors.UserError, match='variance of the first 999 rows is 0: t'
  ):
    state_lib.init_state(
      config, make_mesh(1, 1), np.ones((999, 16), np.float32)
    )
  # Rows of many digits, whose mean is not what they are.
  with pytest.raises(errors.UserError, match='first 999 rows is 0: there is'):
    state_lib.init_state(config, make_mesh(1, 1), np.repeat(ROWS[:1], 999, 0))


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

    @functools.partial(jax.jit, compiler_options=programs.QUICKLY)
    def do_densely(state, raw_BD):
      x_BD, _ = autoencoder.preprocess(config.sae, state.sae, raw_BD)
      dead_N = state.silent_N >= dead_after
      grads = jax.grad(dense_reference.loss, has_aux=True)(
        state.sae, x_BD, dead_N, mse_of_mean, 4, 20, 1 / 32
      )[0]
      pre_BN = (x_BD - state.sae.b_pre_D) @ state.sae.w_enc_ND.T
      fired = dense_reference.topk_codes(pre_BN + state.sae.b_lat_N, 4) > 0
      new, opt, _ = optimizer.update(
        config.optimizer, state.sae, state.optimizer, grads, rate
      )
      return state.replace(
        sae=new,
        optimizer=opt,
        step=state.step + 1,
        silent_N=jnp.where(fired.any(0), 0, state.silent_N + len(raw_BD)),
      )

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
      # Placed as what a step returns, for one program.
      state = jax.tree.map(
        lambda a, like: jax.device_put(a, like.sharding),
        state,
        state_lib.abstract_state(config, one),
      )
      do = step.make_step(config, one)
      for raw_BD in batches(config, ROWS):
        raw_BD = jnp.asarray(raw_BD, jnp.float64)
        if not dense:
          state, values = do(state, raw_BD)
          aux_seen.append(float(values['aux']))
          continue
        state = do_densely(state, raw_BD)
      states.append(state)
    np.testing.assert_array_equal(states[0].silent_N, states[1].silent_N)
    assert np.count_nonzero(aux_seen) > STEPS // 2
    for got, want in zip(*(jax.tree.leaves(s.sae) for s in states)):
      np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_silence_saturates(config):
  made = make_mesh(1, 1)
  state = state_lib.init_state(config, made, ROWS[:500])
  silent_N = np.full(64, 2**31 - 10, np.int32)
  # Placed as before, so that the step is not compiled once more.
  silent_N = jax.device_put(silent_N, state.silent_N.sharding)
  state = state.replace(silent_N=silent_N)
  state, values = step.make_step(config, made)(state, ROWS[:64])
  silent_N = np.asarray(state.silent_N)
  assert float(values['dead_fraction']) == 1
  assert ((silent_N == 0) | (silent_N == 2**31 - 1)).all()
  assert (silent_N > 0).any()
