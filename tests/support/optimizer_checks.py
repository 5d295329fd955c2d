"""The optimiser, and a float64 loop in numpy that it must equal."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import autoencoder
from sae_jax.training import optimizer

CONFIG = optimizer.OptimizerConfig(adam_b1=0.9, ema_decay=0.9)
NAMES = ('w_enc_ND', 'w_dec_ND', 'b_lat_N', 'b_pre_D')


def problem(seed=0, n=9, d=5):
  rng = np.random.default_rng(seed)
  shapes = {'w_enc_ND': (n, d), 'w_dec_ND': (n, d), 'b_lat_N': n, 'b_pre_D': d}
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
    **arrays,
    data_mean_D=jnp.asarray(np.zeros(arrays['b_pre_D'].shape)),
    data_scale=jnp.asarray(np.ones(())),
  )


@functools.cache
def program(config):
  """`optimizer.update`, compiled; clear it when its code changes."""
  # Its results are compared, not its speed.
  return jax.jit(
    lambda *args: optimizer.update(config, *args),
    compiler_options={'xla_backend_optimization_level': 0},
  )


def run(params, grads, config=CONFIG, rate=0.01):
  sae, history = as_sae(params), []
  state = optimizer.init(config, sae)
  for grad in grads:
    sae, state, _ = program(config)(sae, state, as_sae(grad), rate)
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
  average = {name: a / (1 - 0.9 ** len(grads)) for name, a in ema.items()}
  return params, average


def averaged(config, sae, state):
  """The moving average that a run has after its last step."""
  ema = state.ema
  average = jax.jit(autoencoder.averaged, static_argnums=3)
  return average(sae, ema.ema, ema.count, config.ema_decay)


def difference(sae, params):
  return max(abs(np.asarray(getattr(sae, n)) - params[n]).max() for n in NAMES)


def after(config, params, grads, update=optimizer.update, compiled=True):
  """The last step's results, all of them."""
  sae = as_sae(params)
  state, norm = optimizer.init(config, sae), None

  def do(*args):
    return update(config, *args)

  do = jax.jit(do) if compiled else do
  for grad in grads:
    sae, state, norm = do(sae, state, as_sae(grad), jnp.float32(0.01))
  return sae, state, norm


# An epsilon beside which gradients of rounding's size are none.
WIDE = dataclasses.replace(CONFIG, adam_eps=1e-3)


def near(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want))
  return all(np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)


def updates_equal_a_float64_loop():
  with jax.enable_x64(True):
    params, grads = problem()
    history, state = run(params, grads)
    want, want_average = numpy_run(params, grads)
    assert difference(history[-1], want) < 1e-12
    average = averaged(CONFIG, history[-1], state)
    assert difference(average, want_average) < 1e-7
    # Controls: no projection, and unit norm along the wrong axis.
    for defect in ({'project': False}, {'axis': 0}):
      wrong, _ = numpy_run(params, grads, **defect)
      assert difference(history[-1], wrong) > 1e-4
