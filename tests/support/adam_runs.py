"""Steps of the one-pass optimiser kernel, and a float64 loop of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.ops import adam
from sae_jax.ops.adam_rows import api, tiles

# With less epsilon a gradient's sign is its step, and those of rounding's size
# have any.
CONFIG = {'b1': 0.9, 'b2': 0.99, 'eps': 1e-5, 'ema_decay': 0.9}
# Several blocks of several groups at small shapes.
SMALL = tiles.Tile(block=16, group=8, vmem_bytes=2**21)
# N, D: ragged groups and blocks, one row, whole blocks, the usual width.
SHAPES = [(37, 128), (1, 128), (48, 384), (9, 768)]


def problem(n, width, steps=1, seed=0):
  """Unit rows, and gradients that are neither along nor across them."""
  rng = np.random.default_rng(seed)
  p_ND = rng.standard_normal((n, width))
  p_ND /= np.linalg.norm(p_ND, axis=1, keepdims=True)
  grads = 1e-3 * rng.standard_normal((steps, n, width))
  grads += 1e-2 * rng.standard_normal((steps, n, 1)) * p_ND
  state = [p_ND, *[np.zeros((n, width))] * 3]
  return [a.astype(np.float32) for a in state], grads.astype(np.float32)


@functools.cache
def program(implementation, tile, **more):
  """A step, compiled; `tile` is what `tiles` chooses while it is traced."""
  del tile
  do = functools.partial(
    api.adam_rows, implementation=implementation, **CONFIG, **more
  )
  # Its results are compared, not its speed.
  return jax.jit(
    lambda *args: do(*args),
    compiler_options={'xla_backend_optimization_level': 0},
  )


def run(state, grads, implementation, rate=0.01, scale=1.0, **more):
  """The state and the squared norm after all gradients, one at a time."""
  do = program(implementation, tiles.choose(*state[0].shape, 9), **more)
  for count, grad in enumerate(grads):
    corrections = adam.corrections(jnp.int32(count), CONFIG['b1'], CONFIG['b2'])
    *state, squares = do(*state, grad, rate, corrections, scale)
  return state, squares


def loop(state, grads, rate=0.01, scale=1.0, defect=None):
  """The same in float64, with one mistake if named."""
  b1, b2, eps, decay = CONFIG.values()
  p, mu, nu, ema = (a.astype(np.float64) for a in state)

  def norm(a):
    return np.linalg.norm(a, axis=1, keepdims=True)

  for t, g in enumerate(grads.astype(np.float64), 1):
    if defect != 'no projection':
      g = g - (g * p).sum(1, keepdims=True) * p
    squares = (g**2).sum()
    if defect != 'no scale':
      g = scale * g
    if defect == 'norm after the scale':
      squares = (g**2).sum()
    mu = b1 * mu + (1 - b1) * g
    nu = b2 * nu + (1 - b2) * g**2
    c1, c2 = 1 - b1**t, 1 - b2**t
    if defect == 'no bias correction':
      c1 = c2 = 1
    if defect == 'bias a step late':
      c1, c2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
    if defect == 'epsilon inside the root':
      p = p - rate * (mu / c1) / np.sqrt(nu / c2 + eps)
    else:
      p = p - rate * (mu / c1) / (np.sqrt(nu / c2) + eps)
    before = p
    if defect != 'no unit norm':
      p = p / np.where(norm(p) > 0, norm(p), 1)
    mean = before if defect == 'average before unit norm' else p
    ema = decay * ema + (1 - decay) * mean
  return [p, mu, nu, ema], squares


DEFECTS = [
  'no projection',
  'no scale',
  'norm after the scale',
  'no bias correction',
  'bias a step late',
  'epsilon inside the root',
  'no unit norm',
  'average before unit norm',
]


def close(got, want):
  """Whether the states and squared norms agree as float32 can."""
  (state, squares), (wanted, wanted_squares) = got, want
  return np.isclose(squares, wanted_squares, rtol=3e-6) and all(
    np.allclose(a, b, rtol=2e-5, atol=2e-6 * abs(b).max())
    for a, b in zip(map(np.asarray, state), wanted)
  )
