"""A frozen part keeps its bits, and the rest steps as if it were all."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sae_jax import autoencoder
from sae_jax.autoencoder import nonlinearity
from sae_jax.plan import footprint
from sae_jax.training import optimizer, step
from sae_jax.training import state as state_lib
from tests.support import dense_reference, programs, runs
from tests.support.optimizer_checks import (
  after,
  as_sae,
  averaged,
  CONFIG,
  near,
  problem,
  program,
  run,
  WIDE,
)
from tests.support.step_runs import batches, config, make_mesh, ROWS

ARRAY = {'decoder': 'w_dec_ND', 'encoder': 'w_enc_ND'}


def frozen(config, part):
  return dataclasses.replace(config, freeze=part)


def masked(config, part):
  """Adam of all but a part by optax's own masks, after the clipping."""
  config = config.with_defaults()
  return optax.chain(
    optax.masked(
      optax.set_to_zero(), lambda tree: {n: n == ARRAY[part] for n in tree}
    ),
    optax.clip_by_global_norm(config.clip_norm),
    optax.scale_by_adam(
      b1=config.adam_b1, b2=config.adam_b2, eps=config.adam_eps
    ),
  )


def masked_step(config, part, params, state, grads, rate):
  """The step's formula by `masked`: parameters, optax's state, the norm."""
  w_ND, g_ND = params['w_dec_ND'], grads['w_dec_ND']
  g_ND = g_ND - (g_ND * w_ND).sum(1, keepdims=True) * w_ND
  grads = grads | {'w_dec_ND': g_ND}
  updates, state = masked(config, part).update(grads, state)
  new = {name: a - rate * updates[name] for name, a in params.items()}
  w_ND = new['w_dec_ND']
  new['w_dec_ND'] = w_ND / jnp.linalg.norm(w_ND, axis=1, keepdims=True)
  squares = [(g**2).sum() for name, g in grads.items() if name != ARRAY[part]]
  return new | {ARRAY[part]: params[ARRAY[part]]}, state, sum(squares) ** 0.5


@pytest.mark.parametrize('part', ARRAY)
def test_the_rest_steps_as_masked_optax_does_in_float64(part):
  # Less than every norm, the frozen part's gradients counted or not.
  plain = dataclasses.replace(CONFIG, clip_norm=2.0)
  plan, name = frozen(plain, part), ARRAY[part]
  with jax.enable_x64(True):
    params, grads = problem()
    sae, state = as_sae(params), optimizer.init(plan, as_sae(params))
    want = {n: jnp.asarray(a) for n, a in params.items()}
    optax_state = masked(plan, part).init(want)
    mean = jax.tree.map(np.zeros_like, params)
    do = jax.jit(
      functools.partial(masked_step, plan, part),
      compiler_options=programs.QUICKLY,
    )
    for grad in grads:
      sae, state, norm = program(plan)(sae, state, as_sae(grad), 0.01)
      want, optax_state, want_norm = do(want, optax_state, grad, 0.01)
      mean = {n: 0.9 * mean[n] + 0.1 * a for n, a in want.items()}
      np.testing.assert_allclose(norm, want_norm, rtol=1e-12)
      assert norm > plan.clip_norm
    average = averaged(plan, sae, state)
    for n, array in autoencoder.trained(sae).items():
      np.testing.assert_allclose(array, want[n], rtol=1e-9, atol=1e-12)
      mean[n] /= 1 - 0.9 ** len(grads)
      np.testing.assert_allclose(getattr(average, n), mean[n], rtol=1e-6)
    for one in (sae, average):
      runs.assert_same_bits(getattr(one, name), params[name])
    # Control: a run without a frozen part moves it, and counts its gradients
    # in the clipping of all.
    free = run(params, grads, plain)[0][-1]
    assert (getattr(free, name) != params[name]).all()
    assert abs(free.b_pre_D - want['b_pre_D']).max() > 1e-5


@pytest.mark.parametrize('part', ARRAY)
def test_a_frozen_part_has_no_moments_and_its_average_is_itself(part):
  params, grads = problem()
  name, start = ARRAY[part], as_sae(params)
  plan = frozen(CONFIG, part)
  history, state = run(params, grads, plan)
  rest = set(autoencoder.trained(start)) - {name}
  for tree in (state.adam.mu, state.adam.nu, state.ema.ema):
    assert set(tree) == rest
  for got in (history[-1], averaged(plan, history[-1], state)):
    runs.assert_same_bits(getattr(got, name), getattr(start, name))
  # Control: the average of what merely does not move has other last bits.
  still = [jax.tree.map(np.zeros_like, params)] * len(grads)
  history, state = run(params, still)
  mean = averaged(CONFIG, history[-1], state)
  assert (getattr(mean, name) != getattr(start, name)).any()


@pytest.mark.parametrize(
  ('part', 'clip_norm'), [('decoder', 2.0), ('encoder', 0.0), ('encoder', 2.0)]
)
def test_one_pass_over_the_decoder_leaves_a_frozen_part(part, clip_norm):
  plain = dataclasses.replace(WIDE, clip_norm=clip_norm)
  params, grads = problem(n=24, d=128)
  kernel = functools.partial(optimizer.update, implementation='pallas')
  got = after(frozen(plain, part), params, grads[:3], kernel)
  assert near(got, after(frozen(plain, part), params, grads[:3]))
  start = as_sae(params)
  runs.assert_same_bits(
    getattr(got[0], ARRAY[part]), getattr(start, ARRAY[part])
  )
  # Control.
  assert not near(after(plain, params, grads[:3])[0], got[0])


@pytest.mark.parametrize(
  ('part', 'implementation'), [('decoder', None), ('encoder', 'pallas')]
)
def test_a_frozen_gradient_that_is_not_finite_holds_no_step(
  part, implementation
):
  """Nothing reads it: it spoils neither the norm nor an array."""
  params, grads = problem(n=16, d=128)
  sae, good = as_sae(params), as_sae(grads[0])
  bad = good.replace(**{ARRAY[part]: jnp.full((16, 128), jnp.nan)})

  @functools.partial(jax.jit, static_argnums=0)
  def do(plan, state, grads):
    how = {'only_if': True, 'implementation': implementation}
    return optimizer.update(plan, sae, state, grads, 0.01, **how)

  plan = frozen(WIDE, part)
  state = optimizer.init(plan, sae)
  runs.assert_same_bits(do(plan, state, bad), do(plan, state, good))
  # Control: it holds one in which nothing is frozen.
  new, *_ = do(WIDE, optimizer.init(WIDE, sae), bad)
  runs.assert_same_bits(new, sae)


@pytest.mark.parametrize('activation', nonlinearity.NAMES)
def test_a_part_is_the_vectors_of_the_latents_alone(activation):
  sae = state_lib.abstract_sae(autoencoder.SaeConfig(4, 8, 2, activation))
  trained = set(autoencoder.trained(sae))
  assert set(optimizer.unfrozen(CONFIG, sae)) == trained
  for part, name in ARRAY.items():
    rest = set(optimizer.unfrozen(frozen(CONFIG, part), sae))
    assert rest == trained - {name}


@pytest.mark.parametrize('part', ARRAY)
def test_a_plan_counts_no_moments_of_a_frozen_part(part):
  made, mesh = config(), make_mesh(1, 1)
  whole = footprint.arguments(made, mesh).arguments
  plan = frozen(made.optimizer, part)
  made = dataclasses.replace(made, optimizer=plan)
  less = footprint.arguments(made, mesh).arguments
  matrix = 4 * made.sae.n_latents * made.sae.d_model
  assert whole['moments'] - less['moments'] == 2 * matrix
  assert whole['average'] - less['average'] == matrix
  assert less['parameters'] == whole['parameters']


@pytest.mark.parametrize('part', ARRAY)
def test_steps_equal_a_dense_loop_with_masked_optax(part):
  """Gradients with AuxK, clipping and the step, all by others, in float64."""
  made = config()
  # Silent for one batch is dead, so that AuxK takes part at most steps.
  made = dataclasses.replace(
    made,
    steps=6,
    objective=dataclasses.replace(made.objective, dead_after_tokens=64),
    optimizer=frozen(made.optimizer, part),
  )
  rate, mse_of_mean, mesh = made.optimizer.learning_rate, 0.5, make_mesh(1, 1)
  first = state_lib.init_state(made, mesh, ROWS[:500]).sae
  with jax.enable_x64(True):
    start = jax.tree.map(lambda a: jnp.asarray(np.array(a, np.float64)), first)

    @functools.partial(jax.jit, compiler_options=programs.QUICKLY)
    def do_densely(params, state, silent_N, raw_BD):
      sae = start.replace(**params)
      x_BD, _ = autoencoder.preprocess(made.sae, sae, raw_BD)
      grads, (_, aux) = jax.grad(dense_reference.loss, has_aux=True)(
        sae, x_BD, silent_N >= 64, mse_of_mean, 4, 20, 1 / 32
      )
      pre_BN = (x_BD - sae.b_pre_D) @ sae.w_enc_ND.T + sae.b_lat_N
      fired_N = (dense_reference.topk_codes(pre_BN, 4) > 0).any(0)
      silent_N = jnp.where(fired_N, 0, silent_N + len(raw_BD))
      grads = autoencoder.trained(grads)
      params, state, norm = masked_step(
        made.optimizer, part, params, state, grads, rate
      )
      return (params, state, silent_N), {'aux': aux, 'grad_norm': norm}

    state = state_lib.TrainState(
      sae=jax.tree.map(jnp.copy, start),
      optimizer=optimizer.init(made.optimizer, start),
      silent_N=jnp.zeros(64, jnp.int32),
      mse_of_mean=jnp.asarray(mse_of_mean),
      step=jnp.zeros((), jnp.int32),
      skipped=jnp.zeros((), jnp.int32),
    )
    do, auxs = step.make_step(made, mesh), []
    want = autoencoder.trained(start)
    dense = want, masked(made.optimizer, part).init(want), state.silent_N
    for raw_BD in batches(made, ROWS):
      raw_BD = jnp.asarray(raw_BD, jnp.float64)
      dense, want_values = do_densely(*dense, raw_BD)
      state, values = do(state, raw_BD)
      for name, value in want_values.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-9)
      auxs.append(values['aux'])
    assert np.count_nonzero(auxs) >= 3
    for name, array in autoencoder.trained(state.sae).items():
      np.testing.assert_allclose(array, dense[0][name], rtol=1e-8, atol=1e-10)
      moved = bool((array != getattr(start, name)).any())
      assert moved == (name != ARRAY[part])
