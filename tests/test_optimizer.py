"""The optimiser against a float64 loop in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import autoencoder, optimizer
from sae_jax.config import UserError

pytestmark = pytest.mark.fast

CONFIG = optimizer.OptimizerConfig(ema_decay=0.9)
NAMES = ('w_enc_ND', 'w_dec_ND', 'b_lat_N', 'b_pre_D')


def problem(seed=0):
  rng = np.random.default_rng(seed)
  shapes = {'w_enc_ND': (9, 5), 'w_dec_ND': (9, 5), 'b_lat_N': 9, 'b_pre_D': 5}
  params = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
  w = params['w_dec_ND']
  params['w_dec_ND'] = w / np.linalg.norm(w, axis=1, keepdims=True)
  grads = [
    {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    for _ in range(12)
  ]
  return params, grads


def as_sae(params):
  arrays = {name: jnp.asarray(a) for name, a in params.items()}
  return autoencoder.Sae(
    **arrays, data_mean_D=jnp.zeros(5), data_scale=jnp.ones(())
  )


def run(params, grads, config=CONFIG, rate=0.01):
  sae, history = as_sae(params), []
  state = optimizer.init(config, sae)
  for grad in grads:
    sae, state, _ = optimizer.update(
      config, sae, state, as_sae(grad), jnp.asarray(rate)
    )
    history.append(sae)
  return history, state


def numpy_run(
  params, grads, axis=1, project=True, rate=0.01, eps=6.25e-10, b1=0.9, b2=0.999
):
  """Adam with projection, unit norm along `axis` and EMA, step by step."""
  params = {name: a.copy() for name, a in params.items()}
  m = {name: np.zeros_like(a) for name, a in params.items()}
  v = {name: np.zeros_like(a) for name, a in params.items()}
  ema = {name: np.zeros_like(a) for name, a in params.items()}
  for t, grad in enumerate(grads, 1):
    for name in NAMES:
      g = grad[name]
      if name == 'w_dec_ND' and project:
        w = params[name]
        g = g - (g * w).sum(axis, keepdims=True) * w
      m[name] = b1 * m[name] + (1 - b1) * g
      v[name] = b2 * v[name] + (1 - b2) * g**2
      m_hat, v_hat = m[name] / (1 - b1**t), v[name] / (1 - b2**t)
      params[name] = params[name] - rate * m_hat / (np.sqrt(v_hat) + eps)
      if name == 'w_dec_ND':
        norm = np.linalg.norm(params[name], axis=axis, keepdims=True)
        params[name] = params[name] / norm
      ema[name] = 0.9 * ema[name] + 0.1 * params[name]
  averaged = {name: a / (1 - 0.9 ** len(grads)) for name, a in ema.items()}
  return params, averaged


def difference(sae, params):
  return max(abs(np.asarray(getattr(sae, n)) - params[n]).max() for n in NAMES)


def test_updates_equal_a_float64_loop():
  with jax.enable_x64(True):
    params, grads = problem()
    history, state = run(params, grads)
    want, want_average = numpy_run(params, grads)
    assert difference(history[-1], want) < 1e-12
    average = optimizer.averaged(CONFIG, history[-1], state.ema)
    assert difference(average, want_average) < 1e-7
    # Controls: no projection, and unit norm along the wrong axis.
    for defect in ({'project': False}, {'axis': 0}):
      wrong, _ = numpy_run(params, grads, **defect)
      assert difference(history[-1], wrong) > 1e-4


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
  unit = autoencoder.unit_rows(jnp.asarray(rng.standard_normal((6, 4))))
  got = optimizer.project_rows(jnp.asarray(rng.standard_normal((6, 4))), unit)
  np.testing.assert_allclose((got * unit).sum(1), 0, atol=1e-6)
  np.testing.assert_allclose(optimizer.project_rows(got, unit), got, atol=1e-6)
  np.testing.assert_allclose(optimizer.project_rows(unit, unit), 0, atol=1e-6)


def test_average_after_one_step_is_the_parameters():
  params, grads = problem()
  history, state = run(params, grads[:1])
  average = optimizer.averaged(CONFIG, history[0], state.ema)
  assert difference(average, optimizer.trained(history[0])) < 1e-6


def test_average_before_the_first_step_is_the_parameters():
  sae = as_sae(problem()[0])
  average = optimizer.averaged(CONFIG, sae, optimizer.init(CONFIG, sae).ema)
  assert difference(average, optimizer.trained(sae)) == 0


@pytest.mark.parametrize('decay', [0.9, 0.999, 0.99999])
def test_average_of_constants_is_the_constant_in_float32(decay):
  config = optimizer.OptimizerConfig(ema_decay=decay)
  params, _ = problem()
  still = {name: np.zeros_like(a) for name, a in params.items()}
  history, state = run(params, [still] * 50, config, rate=0.0)
  average = optimizer.averaged(config, history[-1], state.ema)
  assert difference(average, optimizer.trained(history[-1])) < 2e-5
  # Control: the textbook correction in float32 misses by the decay's lost
  # digits, more the nearer it is to 1.
  if decay == 0.99999:
    seen = 1 - jnp.float32(decay) ** 50
    naive = state.ema.ema['b_pre_D'] / seen
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
    _, state, found = optimizer.update(config, sae, start, one, 0.01)
    np.testing.assert_allclose(found, norm, rtol=1e-12)
    for name in NAMES:
      # Adam's first moment shows what it was given.
      np.testing.assert_allclose(
        state.adam.mu[name], 0.1 * g[name] / 3, rtol=1e-10, atol=1e-14
      )
    # Controls: a limit that is not reached changes nothing, nor does no limit.
    for other in (2 * norm, 0.0):
      config = dataclasses.replace(CONFIG, clip_norm=other)
      _, state, _ = optimizer.update(config, sae, start, one, 0.01)
      np.testing.assert_allclose(state.adam.mu['b_pre_D'], 0.1 * g['b_pre_D'])
    # Gradients of zero are left as they are.
    still = jax.tree.map(jnp.zeros_like, sae)
    _, state, found = optimizer.update(config, sae, start, still, 0.01)
    assert found == 0 and not state.adam.mu['b_pre_D'].any()


def test_learning_rate_rule_is_inverse_square_root():
  for n, want in ((2**14, 2e-4), (2**12, 4e-4), (2**16, 1e-4)):
    np.testing.assert_allclose(optimizer.peak_rate(CONFIG, n), want, rtol=1e-6)
  named = dataclasses.replace(CONFIG, learning_rate=0.5)
  assert optimizer.peak_rate(named, 2**12) == 0.5


@pytest.mark.parametrize('decay', optimizer.DECAYS)
def test_schedule_rises_stays_and_falls(decay):
  config = dataclasses.replace(
    CONFIG, warmup_steps=4, decay_steps=5, decay=decay
  )
  schedule = optimizer.schedule(config, 20)
  rates = np.array([schedule(step) for step in range(20)])
  np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
  np.testing.assert_allclose(rates[4:16], 1.0)
  left = np.arange(5) / 5
  want = 1 - left if decay == 'linear' else (1 + np.cos(np.pi * left)) / 2
  np.testing.assert_allclose(rates[15:], want, rtol=1e-6)


def test_a_schedule_longer_than_the_run_is_refused():
  config = dataclasses.replace(CONFIG, warmup_steps=8, decay_steps=5)
  with pytest.raises(UserError, match=r'8 \+ decay_steps 5 exceed the 10'):
    optimizer.schedule(config, 10)
