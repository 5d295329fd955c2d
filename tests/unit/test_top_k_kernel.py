"""The kernel that sorts rows for their top k: exact on any input."""

import functools

import jax
import numpy as np
import pytest

from sae_jax.ops.top_k import kernel
from tests.support.top_k_checks import stable_top_k

RNG = np.random.default_rng(0)
# Blocks of 32 candidates, so several of them, the last one short.
N, BLOCK = 150, 32
ROWS = {
  'random': RNG.standard_normal((3, N)),
  'all equal': np.zeros((3, N)),
  'few values': RNG.integers(-2, 3, (3, N)),
  'ascending': np.tile(np.arange(N), (3, 1)),
  'descending': -np.tile(np.arange(N), (3, 1)),
  'two zeros': np.where(np.arange(N) % 3, -0.0, 0.0) * np.ones((3, 1)),
  'infinite': np.where(
    np.arange(N) % 7, RNG.standard_normal((3, N)), (-1) ** np.arange(N) * np.inf
  ),
}


@functools.partial(jax.jit, static_argnames=('k', 'block'))
def run(x_BN, k, block=BLOCK):
  return kernel.top_k(x_BN, k, block=block, interpret=True)


@pytest.mark.parametrize('name', ROWS)
def test_it_takes_what_a_stable_sort_puts_first(name):
  x_BN = ROWS[name].astype(np.float32)
  vals, idx = run(x_BN, 20)
  want_vals, want_idx = stable_top_k(x_BN, 20)
  np.testing.assert_array_equal(vals, want_vals)
  np.testing.assert_array_equal(idx, want_idx)
  if name == 'random':
    # Control: without what earlier blocks left it would be wrong.
    assert (want_idx < N // BLOCK * BLOCK).any(1).all()
    assert len(np.unique(want_idx[0] // BLOCK)) > 3


def test_what_is_no_number_comes_first():
  x_BN = ROWS['infinite'].astype(np.float32)
  x_BN[:, [3, 77]] = np.nan
  x_BN[:, 40] = -np.float32(np.nan)
  vals, idx = run(x_BN, 20)
  np.testing.assert_array_equal(idx[:, :3], [[3, 40, 77]] * 3)
  assert np.isnan(vals[:, :3]).all()
  want_vals, want_idx = stable_top_k(np.delete(x_BN, [3, 40, 77], 1), 17)
  np.testing.assert_array_equal(vals[:, 3:], want_vals)
  kept = np.delete(np.arange(N), [3, 40, 77])
  np.testing.assert_array_equal(idx[:, 3:], kept[want_idx])
