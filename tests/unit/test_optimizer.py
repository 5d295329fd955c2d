"""The optimiser against a float64 loop in numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sae_jax import autoencoder, errors
from sae_jax.ops import rows
from sae_jax.training import optimizer
from tests.support.optimizer_checks import (
  after,
  as_sae,
  averaged,
  CONFIG,
  difference,
  NAMES,
  near,
  numpy_run,
  problem,
  program,
  run,
  updates_equal_a_float64_loop,
  WIDE,
)


def test_updates_equal_a_float64_loop():
  updates_equal_a_float64_loop()


def test_betas_and_epsilon_are_the_configs():
  with jax.enable_x64(True):
    params, grads = problem()
    config = dataclasses.replace(CONFIG, adam_b1=0.7, adam_b2=0.9, adam_eps=0.1)
    history, _ = run(params, grads, config)
    want, _ = numpy_run(params, grads, b1=0.7, b2=0.9, eps=0.1)
    assert difference(history[-1], want) < 1e-12


def test_decoder_rows_have_unit_norm_after_every_step():
  params, grads = problem()
  for sae in run(params, grads)[0]:
    norms = np.linalg.norm(sae.w_dec_ND, axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-6)


def test_projection_leaves_what_is_orthogonal():
  rng = np.random.default_rng(1)
  project = jax.jit(rows.project_rows)
  unit = np.asarray(jax.jit(rows.unit_rows)(rng.standard_normal((6, 4))))
  got = np.asarray(project(rng.standard_normal((6, 4)), unit))
  np.testing.assert_allclose((got * unit).sum(1), 0, atol=1e-6)
  np.testing.assert_allclose(project(got, unit), got, atol=1e-6)
  np.testing.assert_allclose(project(unit, unit), 0, atol=1e-6)


def test_average_after_one_step_is_the_parameters():
  params, grads = problem()
  history, state = run(params, grads[:1])
  average = averaged(CONFIG, history[0], state)
  assert difference(average, autoencoder.trained(history[0])) < 1e-6


def test_average_before_the_first_step_is_the_parameters():
  sae = as_sae(problem()[0])
  average = averaged(CONFIG, sae, optimizer.init(CONFIG, sae))
  assert difference(average, autoencoder.trained(sae)) == 0


@pytest.mark.parametrize('decay', [0.9, 0.999, 0.99999])
def test_average_of_constants_is_the_constant_in_float32(decay):
  config = optimizer.OptimizerConfig(ema_decay=decay)
  params, _ = problem()
  still = {name: np.zeros_like(a) for name, a in params.items()}
  history, state = run(params, [still] * 50, config, rate=0.0)
  average = averaged(config, history[-1], state)
  assert difference(average, autoencoder.trained(history[-1])) < 2e-5
  # Control: the textbook correction in float32 misses by the decay's lost
  # digits, more the nearer it is to 1.
  if decay == 0.99999:
    seen = 1 - np.float32(decay) ** np.float32(50)
    naive = np.asarray(state.ema.ema['b_pre_D']) / seen
    assert naive.dtype == np.float32
    assert abs(naive / history[-1].b_pre_D - 1).max() > 2e-4


def test_clipping_scales_all_projected_gradients_by_one_factor():
  params, grads = problem()
  grads = [{name: 10 * a for name, a in grad.items()} for grad in grads]
  w = params['w_dec_ND']
  g = dict(grads[0])
  g['w_dec_ND'] = g['w_dec_ND'] - (g['w_dec_ND'] * w).sum(1, keepdims=True) * w
  norm = np.sqrt(sum((a**2).sum() for a in g.values()))
  limit = norm / 3
  config = dataclasses.replace(CONFIG, clip_norm=limit)
  with jax.enable_x64(True):
    sae = as_sae(params)
    start = optimizer.init(config, sae)
    one = as_sae(grads[0])
    _, state, found = program(config)(sae, start, one, 0.01)
    np.testing.assert_allclose(found, norm, rtol=1e-12)
    for name in NAMES:
      # Adam's first moment shows what it was given.
      np.testing.assert_allclose(
        state.adam.mu[name], 0.1 * g[name] / 3, rtol=1e-10, atol=1e-14
      )
    # Controls: a limit that is not reached changes nothing, nor does no limit.
    for other in (2 * norm, 0.0):
      config = dataclasses.replace(CONFIG, clip_norm=other)
      _, state, _ = program(config)(sae, start, one, 0.01)
      np.testing.assert_allclose(state.adam.mu['b_pre_D'], 0.1 * g['b_pre_D'])
    # Gradients of zero are left as they are.
    config = dataclasses.replace(CONFIG, clip_norm=limit)
    still = jax.tree.map(np.zeros_like, sae)
    _, state, found = program(config)(sae, start, still, 0.01)
    assert found == 0 and not np.any(state.adam.mu['b_pre_D'])


def by_optax(config, sae, state, grads, rate, *, first_clip=False):
  """The formula of the plain step, as runs before this had it."""
  gradients = autoencoder.trained(grads)

  def project(gradients):
    g_ND, w_ND = gradients['w_dec_ND'], sae.w_dec_ND
    g_ND = g_ND - (g_ND * w_ND).sum(-1, keepdims=True) * w_ND
    return gradients | {'w_dec_ND': g_ND}

  def clip(gradients):
    if not config.clip_norm:
      return gradients
    scale = jnp.minimum(1, config.clip_norm / norm)
    return jax.tree.map(lambda g: scale * g, gradients)

  norm = optax.tree.norm(project(gradients))
  if first_clip:
    gradients = project(clip(gradients))
  else:
    gradients = clip(project(gradients))
  updates, adam = optax.scale_by_adam(
    b1=config.adam_b1, b2=config.adam_b2, eps=config.adam_eps
  ).update(gradients, state.adam)
  params = jax.tree.map(
    lambda p, u: p - (rate * u).astype(p.dtype),
    autoencoder.trained(sae),
    updates,
  )
  params['w_dec_ND'] = rows.unit_rows(params['w_dec_ND'])
  _, ema = optax.ema(config.ema_decay, debias=True).update(params, state.ema)
  return sae.replace(**params), optimizer.OptimizerState(adam, ema), norm


def same_bits(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want))
  return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize('clip_norm', [0.0, 2.0])
@pytest.mark.parametrize('compiled', [False, True])
def test_plain_steps_keep_their_bits(clip_norm, compiled):
  config = dataclasses.replace(CONFIG, clip_norm=clip_norm)
  params, grads = problem(n=24, d=33)
  want = after(config, params, grads[:4], by_optax, compiled)
  for implementation in (None, 'gather', 'dense'):
    update = functools.partial(
      optimizer.update, implementation=implementation, mesh=None
    )
    got = after(config, params, grads[:4], update, compiled)
    assert same_bits(got, want)
  # Control: the same numbers, rounded in another order.
  if clip_norm:
    other = functools.partial(by_optax, first_clip=True)
    other = after(config, params, grads[:4], other, compiled)
    assert not same_bits(other, want)
    np.testing.assert_allclose(other[0].w_enc_ND, want[0].w_enc_ND, rtol=1e-4)


@pytest.mark.parametrize('implementation', [None, 'pallas'])
def test_a_step_is_held_unless_all_is_finite(implementation):
  params, grads = problem(n=16, d=128)
  sae = as_sae(params)
  _, state, _ = program(WIDE)(
    sae, optimizer.init(WIDE, sae), as_sae(grads[0]), 0.01
  )

  @jax.jit
  def do(grads, only_if):
    *new, _ = optimizer.update(
      WIDE,
      sae,
      state,
      grads,
      0.01,
      only_if=only_if,
      implementation=implementation,
    )
    return tuple(new)

  good = as_sae(grads[1])
  *want, _ = program(WIDE)(sae, state, good, 0.01)
  assert near(do(good, True), tuple(want))
  assert same_bits(do(good, False), (sae, state))
  for name in NAMES:
    array = np.array(getattr(good, name))
    array[(3,) * array.ndim] = np.nan
    bad = good.replace(**{name: jnp.asarray(array)})
    assert same_bits(do(bad, True), (sae, state))
  # Control: without the guard it is taken.
  spoilt, _, _ = program(WIDE)(sae, state, bad, 0.01)
  assert np.isnan(spoilt.b_pre_D).any()


@pytest.mark.parametrize('decay', optimizer.DECAYS)
def test_schedule_rises_stays_and_falls(decay):
  config = dataclasses.replace(
    CONFIG, warmup_steps=4, decay_steps=5, decay=decay
  )
  schedule = optimizer.schedule(config, 20)
  rates = np.asarray(jax.jit(jax.vmap(schedule))(np.arange(20)))
  np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
  np.testing.assert_allclose(rates[4:16], 1.0)
  left = np.arange(5) / 5
  want = 1 - left if decay == 'linear' else (1 + np.cos(np.pi * left)) / 2
  np.testing.assert_allclose(rates[15:], want, rtol=1e-6)


def test_a_schedule_longer_than_the_run_is_refused():
  config = dataclasses.replace(CONFIG, warmup_steps=8, decay_steps=5)
  with pytest.raises(
    errors.UserError, match=r'8 \+ decay_steps 5 exceed the 10'
  ):
    optimizer.schedule(config, 10)
