"""The one-pass optimiser kernel: numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import errors
from sae_jax.ops import adam
from sae_jax.ops.adam_rows import api, tiles
from tests.support.adam_runs import (
  close,
  CONFIG,
  DEFECTS,
  loop,
  problem,
  program,
  run,
  SHAPES,
  SMALL,
)


@pytest.fixture
def small(monkeypatch):
  monkeypatch.setattr(tiles, 'choose', lambda n, width, matrices: SMALL)


@pytest.mark.parametrize('n, width', SHAPES)
@pytest.mark.parametrize('scale', [1.0, 0.25])
def test_kernel_and_reference_equal_a_float64_loop(small, n, width, scale):
  state, grads = problem(n, width, steps=4)
  want = loop(state, grads, scale=scale)
  for implementation in ('pallas', None):
    assert close(run(state, grads, implementation, scale=scale), want)


@pytest.mark.parametrize('implementation', ['pallas', None])
def test_a_gradient_is_left_as_it_is_on_request(small, implementation):
  state, grads = problem(37, 128, steps=4)
  got = run(state, grads, implementation, scale=0.25, project=False)
  assert close(got, loop(state, grads, scale=0.25, defect='no projection'))
  # Control: it is another step.
  assert not close(got, loop(state, grads, scale=0.25))
  alone = api.squared_norm(
    got[0][0], grads[0], project=False, implementation=implementation
  )
  np.testing.assert_allclose(alone, (grads[0] ** 2).sum(), rtol=1e-6)


def test_control_mistakes_are_seen(small):
  state, grads = problem(37, 128, steps=4)
  got = run(state, grads, 'pallas', scale=0.25)
  assert close(got, loop(state, grads, scale=0.25))
  for defect in DEFECTS:
    assert not close(got, loop(state, grads, scale=0.25, defect=defect)), defect


def test_tiles_change_nothing():
  state, grads = problem(100, 128, steps=2)
  want = run(state, grads, 'pallas')
  for tile in (SMALL, tiles.Tile(32, 32, 2**21), tiles.Tile(200, 8, 2**21)):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(tiles, 'choose', lambda *_, tile=tile: tile)
      assert close(run(state, grads, 'pallas'), want)


def test_zero_rows_and_zero_gradients(small):
  state, grads = problem(37, 128, steps=2)
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


@pytest.mark.parametrize('implementation', ['pallas', 'gather'])
def test_a_step_that_is_not_taken_leaves_everything(small, implementation):
  state, grads = problem(37, 128, steps=2)
  state, _ = run(state, grads[:1], None)
  bad = grads[1].copy()
  bad[3] = np.nan
  do = program(implementation, SMALL)
  one = adam.corrections(jnp.int32(1), CONFIG['b1'], CONFIG['b2'])
  *got, squares = do(*state, bad, 0.01, one, 1.0, jnp.array(False))
  jax.tree.map(np.testing.assert_array_equal, got, state)
  assert np.isnan(squares)
  got = do(*state, grads[1], 0.01, one, 1.0, jnp.array(True))
  want = do(*state, grads[1], 0.01, one, 1.0)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6), got, want
  )
  # Control: the step would have moved them.
  assert np.any(np.asarray(want[0]) != state[0])


@pytest.mark.parametrize('n, width', SHAPES)
def test_the_norm_alone_is_that_of_the_step(small, n, width):
  (p_ND, *rest), grads = problem(n, width)
  got = api.squared_norm(p_ND, grads[0], implementation='pallas')
  _, squares = run([p_ND, *rest], grads, 'pallas')
  np.testing.assert_allclose(got, squares, rtol=1e-6)
  np.testing.assert_allclose(got, api.squared_norm(p_ND, grads[0]), rtol=1e-6)


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
