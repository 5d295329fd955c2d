"""The one-pass optimiser kernel: numbers and races."""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import errors
from sae_jax import mesh as mesh_lib
from sae_jax.ops.adam_rows import api, kernel, reference, tiles

# With less epsilon a gradient's sign is its step, and those of rounding's size
# have any.
CONFIG = {'b1': 0.9, 'b2': 0.99, 'eps': 1e-5, 'ema_decay': 0.9}
# Several blocks of several groups at small shapes.
SMALL = tiles.Tile(block=16, group=8, vmem_bytes=2**21)
# N, D: ragged groups and blocks, one row, whole blocks, the usual width.
SHAPES = [(37, 128), (1, 128), (48, 384), (9, 768)]


@pytest.fixture
def small(monkeypatch):
  monkeypatch.setattr(tiles, 'choose', lambda n, width, matrices: SMALL)


def problem(n, width, steps=1, seed=0):
  """Unit rows, and gradients that are neither along nor across them."""
  rng = np.random.default_rng(seed)
  p_ND = rng.standard_normal((n, width))
  p_ND /= np.linalg.norm(p_ND, axis=1, keepdims=True)
  grads = 1e-3 * rng.standard_normal((steps, n, width))
  grads += 1e-2 * rng.standard_normal((steps, n, 1)) * p_ND
  state = [p_ND, *[np.zeros((n, width))] * 3]
  return [a.astype(np.float32) for a in state], grads.astype(np.float32)


def run(state, grads, implementation, rate=0.01, scale=1.0, **more):
  """The state and the squared norm after all gradients, one at a time."""
  do = jax.jit(
    functools.partial(
      api.adam_rows, implementation=implementation, **CONFIG, **more
    )
  )
  for count, grad in enumerate(grads):
    *state, squares = do(*state, grad, rate, jnp.int32(count), scale)
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


@pytest.mark.fast
@pytest.mark.parametrize('n, width', SHAPES)
@pytest.mark.parametrize('scale', [1.0, 0.25])
def test_kernel_and_reference_equal_a_float64_loop(small, n, width, scale):
  state, grads = problem(n, width, steps=4)
  want = loop(state, grads, scale=scale)
  for implementation in ('pallas', None):
    assert close(run(state, grads, implementation, scale=scale), want)


@pytest.mark.fast
def test_control_mistakes_are_seen(small):
  state, grads = problem(24, 128, steps=4)
  got = run(state, grads, 'pallas', scale=0.25)
  assert close(got, loop(state, grads, scale=0.25))
  for defect in DEFECTS:
    assert not close(got, loop(state, grads, scale=0.25, defect=defect)), defect


@pytest.mark.fast
def test_tiles_change_nothing():
  state, grads = problem(100, 128, steps=2)
  want = run(state, grads, 'pallas')
  for tile in (SMALL, tiles.Tile(32, 32, 2**21), tiles.Tile(200, 8, 2**21)):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(tiles, 'choose', lambda *_, tile=tile: tile)
      assert close(run(state, grads, 'pallas'), want)


@pytest.mark.fast
def test_zero_rows_and_zero_gradients(small):
  state, grads = problem(20, 128, steps=2)
  state[0][3] = 0
  grads[:, 3] = 0
  grads[:, 5] = 0
  (p, mu, nu, ema), _ = run(state, grads, 'pallas')
  for array in (p, mu, nu, ema):
    np.testing.assert_array_equal(array[3], 0)
    assert np.isfinite(array).all()
  np.testing.assert_allclose(p[5], state[0][5], atol=1e-7)
  assert not np.asarray(mu[5]).any() and not np.asarray(nu[5]).any()
  # A gradient along its row is no gradient.
  grads[0] = state[0]
  (p, mu, _, _), squares = run(state, grads[:1], 'pallas')
  assert squares < 1e-10 and abs(np.asarray(mu)).max() < 1e-6


@pytest.mark.fast
def test_a_row_that_is_not_finite_stays_alone(small):
  state, grads = problem(37, 128)
  want, _ = run(state, grads, 'pallas')
  grads[0, 11, 7] = np.nan
  got, squares = run(state, grads, 'pallas')
  assert np.isnan(squares)
  others = np.arange(37) != 11
  for a, b in zip(got, want):
    assert np.isnan(a[11]).any()
    np.testing.assert_array_equal(a[others], b[others])


@pytest.mark.fast
@pytest.mark.parametrize('implementation', ['pallas', 'gather'])
def test_a_step_that_is_not_taken_leaves_everything(small, implementation):
  state, grads = problem(37, 128, steps=2)
  state, _ = run(state, grads[:1], None)
  bad = grads[1].copy()
  bad[3] = np.nan
  do = functools.partial(api.adam_rows, implementation=implementation, **CONFIG)
  one = jnp.int32(1)
  *got, squares = do(*state, bad, 0.01, one, 1.0, jnp.array(False))
  jax.tree.map(np.testing.assert_array_equal, got, state)
  assert np.isnan(squares)
  got = do(*state, grads[1], 0.01, one, 1.0, jnp.array(True))
  want = do(*state, grads[1], 0.01, one)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want
  )
  # Control: the step would have moved them.
  assert (want[0] != state[0]).any()


@pytest.mark.fast
@pytest.mark.parametrize('n, width', SHAPES)
def test_the_norm_alone_is_that_of_the_step(small, n, width):
  (p_ND, *rest), grads = problem(n, width)
  got = api.squared_norm(p_ND, grads[0], implementation='pallas')
  _, squares = run([p_ND, *rest], grads, 'pallas')
  np.testing.assert_allclose(got, squares, rtol=1e-6)
  np.testing.assert_allclose(got, api.squared_norm(p_ND, grads[0]), rtol=1e-6)


@pytest.mark.fast
def test_the_norm_of_what_a_projection_leaves_keeps_its_digits(small):
  (p_ND, *_), grads = problem(8, 128)
  # It leaves some 3e-4 of the gradient.
  g_ND = p_ND + 0.03 * grads[0]
  along_N1 = (p_ND.astype(np.float64) * g_ND).sum(1, keepdims=True)
  want = ((g_ND - along_N1 * p_ND) ** 2).sum()
  got = api.squared_norm(p_ND, g_ND, implementation='pallas')
  np.testing.assert_allclose(got, want, rtol=1e-4)
  # Control: the square multiplied out, which needs no second use of a row.
  along_N = (p_ND * g_ND).sum(1)
  out_N = (g_ND**2).sum(1) - along_N**2 * (2 - (p_ND**2).sum(1))
  assert out_N.dtype == np.float32 and abs(out_N.sum() / want - 1) > 0.01


def sharded(mesh, arrays):
  return [jax.device_put(a, mesh_lib.sharding(mesh, 'ND')) for a in arrays]


@pytest.mark.fast
@pytest.mark.parametrize('latent', [4, 8])
def test_shards_equal_one_device(latent):
  mesh = mesh_lib.make_mesh(8 // latent, latent)
  state, grads = problem(40, 128, steps=2)
  want = run(state, grads, 'pallas')
  got = run(sharded(mesh, state), sharded(mesh, grads), 'pallas', mesh=mesh)
  assert close(got, want)
  assert all(a.sharding.spec == mesh_lib.RULES.spec('ND') for a in got[0])
  (p_ND, *_), _ = want
  norm = functools.partial(api.squared_norm, implementation='pallas', mesh=mesh)
  got = jax.jit(norm)(*sharded(mesh, [p_ND, grads[1]]))
  np.testing.assert_allclose(
    got, reference.squared_norm(p_ND, grads[1]), rtol=1e-6
  )
  # Control: a shard's rows are not all.
  few = 40 // latent
  part = reference.squared_norm(p_ND[:few], grads[1][:few])
  assert not np.isclose(got, part, rtol=1e-2)


@pytest.mark.fast
def test_errors_say_what_to_do():
  state, grads = problem(4, 100)
  with pytest.raises(
    errors.UserError, match=r'a multiple of 128, not 100: use'
  ):
    run(state, grads, 'pallas')
  with pytest.raises(
    errors.UserError, match=r'needs float32, not bfloat16: use'
  ):
    run([a.astype(jnp.bfloat16) for a in state], grads, 'pallas')
  with pytest.raises(errors.UserError, match=r"'fast' is not known: use one"):
    run(state, grads, 'fast')
  run(state, grads, 'dense')


@pytest.mark.parametrize('n', [1, 9, 100, 2**17])
@pytest.mark.parametrize('width', [128, 768, 4096, 16_384])
def test_tiles_are_whole_groups_that_fit(n, width):
  for matrices in (2, 9):
    tile = tiles.choose(n, width, matrices)
    assert tile.block % tile.group == 0 and tile.group % 8 == 0
    assert tile.block - tile.group < n
    assert tile.vmem_bytes <= 2**24


def strict():
  return pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory='nan',
    out_of_bounds_reads='raise',
    num_cores_or_threads=2,
  )


@pytest.fixture
def races():
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  yield lambda: interpret_pallas_call.races.races_found
  pltpu.reset_tpu_interpret_mode_state()


def strict_step(n):
  """What the strict interpreter and the plain one make of a step."""
  state, grads = problem(n, 128)
  scalars = jnp.array([0.01, 2.0, 3.0, 0.5, 1.0], jnp.float32)
  return [
    kernel.adam_rows(
      scalars,
      *state,
      grads[0],
      guarded=True,
      tile=SMALL,
      interpret=interpret,
      **CONFIG,
    )
    for interpret in (strict(), True)
  ]


def test_cores_do_not_race(races):
  got, want = strict_step(32)
  assert not races()
  jax.tree.map(np.testing.assert_array_equal, got[:4], want[:4])
  np.testing.assert_allclose(got[4], want[4], rtol=1e-6)


def test_rows_past_the_last_are_not_counted(races, monkeypatch):
  # The strict interpreter of jax 0.10 returns an output that lies over its
  # input with the padding of a ragged block: they lie apart here.
  call = pl.pallas_call
  monkeypatch.setattr(
    pl,
    'pallas_call',
    lambda *args, input_output_aliases=None, **more: call(*args, **more),
  )
  got, want = strict_step(21)
  assert not races()
  # What lies past the last row is NaN in it.
  assert np.isfinite(got[4])
  jax.tree.map(np.testing.assert_array_equal, got[:4], want[:4])

  def norm():
    (p_ND, *_), grads = problem(21, 128)
    return kernel.squared_norm(p_ND, grads[0], tile=SMALL, interpret=strict())

  np.testing.assert_allclose(norm(), got[4], rtol=1e-6)
  # Control: counting them is seen.
  monkeypatch.setattr(
    kernel, '_squares', lambda g_GD, _: (g_GD**2).sum(-1, keepdims=True)
  )
  assert np.isnan(norm())


def test_control_a_sum_that_cores_share_is_a_race(races, monkeypatch):
  monkeypatch.setattr(
    kernel, '_partial_block', lambda: pl.BlockSpec((8, 128), lambda i: (0, 0))
  )
  try:
    strict_step(32)
    raced = races()
  except jax.errors.JaxRuntimeError as error:
    # jax 0.12 raises where 0.10 takes note.
    raced = 'RACE DETECTED' in str(error)
  assert raced
