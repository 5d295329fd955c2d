"""The training step: equal on every mesh, and equal to a dense loop."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

from sae_jax import autoencoder, mesh, optimizer, step
from tests import dense_reference, planted

pytestmark = pytest.mark.fast

STEPS = 12
ROWS = planted.activations(3000)


def batches(config):
  for i in range(STEPS):
    start = i * config.batch_size
    yield ROWS[start : start + config.batch_size]


def make_mesh(data, latent):
  return jax.make_mesh(
    (data, latent),
    mesh.AXES,
    axis_types=(AxisType.Auto,) * 2,
    devices=jax.devices()[: data * latent],
  )


def run(config, shape):
  """Losses, fired sets and last parameters of a few steps on a mesh."""
  made = make_mesh(*shape)
  state = step.init_state(config, made, ROWS[:500])
  do = step.make_step(config, made)
  losses, silent = [], []
  for raw_BD in batches(config):
    placed = jax.device_put(raw_BD, mesh.sharding(made, 'BD'))
    state, values = do(state, placed)
    losses.append({name: float(v) for name, v in values.items()})
    silent.append(np.asarray(state.silent_N))
  return losses, silent, state


@pytest.fixture(scope='module')
def config():
  # Dead after a few steps, so that AuxK takes part.
  made = planted.train_config(steps=STEPS)
  # More of them than a shard of the 1x8 mesh has latents.
  aux = dataclasses.replace(made.objective, dead_after_tokens=3 * 64, k_aux=20)
  return dataclasses.replace(made, objective=aux)


@pytest.fixture(scope='module')
def unsharded(config):
  return run(config, (1, 1))


@pytest.mark.parametrize('shape', [(2, 4), (8, 1), (1, 8)])
def test_a_mesh_changes_nothing_but_rounding(config, unsharded, shape):
  losses, silent, state = run(config, shape)
  want_losses, want_silent, want_state = unsharded
  assert max(row['aux'] for row in want_losses) > 0
  for got, want in zip(losses, want_losses):
    for name in want:
      np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-12)
  # The same latents fired at every step.
  np.testing.assert_array_equal(silent, want_silent)
  for got, want in zip(
    jax.tree.leaves(state.sae), jax.tree.leaves(want_state.sae)
  ):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  per_shard = state.sae.w_enc_ND.sharding.shard_shape((64, 16))
  assert per_shard == (64 // shape[1], 16)
  moments = state.optimizer.adam.mu['w_dec_ND']
  assert moments.sharding.shard_shape((64, 16)) == per_shard


def test_control_a_sum_that_forgets_the_data_axis_is_seen(
  config, unsharded, monkeypatch
):
  """Latents that fire on another data shard must count as alive."""
  from sae_jax import objective

  whole = objective._sum
  monkeypatch.setattr(
    objective,
    '_sum',
    lambda x, axes: (
      jax.lax.pmax(x * (jax.lax.axis_index('data') == 0), 'data')
      if axes == ('data',) and x.dtype == jnp.int32
      else whole(x, axes)
    ),
  )
  _, silent, _ = run(config, (2, 4))
  assert (np.array(silent) != np.array(unsharded[1])).any()


def test_steps_equal_a_dense_loop_in_float64(config):
  """The step's parts, composed, against autodiff of the dense objective."""
  # Silent for one batch is dead, so that AuxK takes part at most steps.
  aux = dataclasses.replace(config.objective, dead_after_tokens=64)
  config = dataclasses.replace(config, objective=aux)
  with jax.enable_x64(True):
    sae = jax.tree.map(
      lambda a: jnp.asarray(np.asarray(a), jnp.float64),
      step.init_state(config, make_mesh(1, 1), ROWS[:500]).sae,
    )
    mse_of_mean, schedule = (
      0.5,
      optimizer.learning_rate(config.optimizer, 64, STEPS),
    )
    dead_after = config.objective.dead_after_tokens
    states, aux_seen = [], []
    for dense in (False, True):
      one = make_mesh(1, 1)
      state = step.TrainState(
        sae=jax.tree.map(jnp.copy, sae),
        optimizer=optimizer.init(config.optimizer, sae),
        silent_N=jnp.zeros(64, jnp.int32),
        mse_of_mean=jnp.asarray(mse_of_mean),
        step=jnp.zeros((), jnp.int32),
      )
      do = step.make_step(config, one)
      for raw_BD in batches(config):
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
        new, opt = optimizer.update(
          config.optimizer, state.sae, state.optimizer, grads,
          schedule(state.step),
        )  # fmt: skip
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
  state = step.init_state(config, made, ROWS[:500])
  state = state.replace(silent_N=jnp.full(64, 2**31 - 10, jnp.int32))
  state, values = step.make_step(config, made)(state, ROWS[:64])
  silent_N = np.asarray(state.silent_N)
  assert float(values['dead_fraction']) == 1
  assert ((silent_N == 0) | (silent_N == 2**31 - 1)).all()
  assert (silent_N > 0).any()


def test_abstract_state_is_that_of_a_real_one(config):
  made = make_mesh(2, 4)
  real = step.init_state(config, made, ROWS[:500])
  for a, b in zip(
    jax.tree.leaves(step.abstract_state(config, made)), jax.tree.leaves(real)
  ):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_initial_weights_do_not_depend_on_the_mesh(config):
  one = step.init_state(config, make_mesh(1, 1), ROWS[:500])
  many = step.init_state(config, make_mesh(2, 4), ROWS[:500])
  np.testing.assert_array_equal(one.sae.w_dec_ND, many.sae.w_dec_ND)
  np.testing.assert_allclose(one.sae.w_enc_ND, many.sae.w_enc_ND, rtol=1e-6)


def test_evaluation_is_of_the_averaged_weights_on_every_mesh(config):
  totals = []
  for shape in ((1, 1), (2, 4)):
    _, _, state = run(config, shape)
    made = make_mesh(*shape)
    placed = jax.device_put(ROWS[-512:], mesh.sharding(made, 'BD'))
    totals.append(step.make_evaluation(config, made)(state, placed))
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
