"""The k-th largest entries and medians of rows, beside sorted ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.ops.top_k import ordered


def rows(kind, n):
  rng = np.random.default_rng(n)
  x = np.float32(rng.standard_normal((7, n)))
  if kind == 'ties':
    x = np.round(x)
  elif kind == 'scales':
    x *= np.float32(10.0 ** rng.integers(-30, 30, x.shape))
  elif kind == 'infinite':
    x = np.where(rng.random(x.shape) < 0.6, np.inf * np.sign(x), x)
  elif kind == 'zeros':
    x = np.where(rng.random(x.shape) < 0.8, 0 * x, x)
  return x


@pytest.mark.parametrize('kind', ['normal', 'ties', 'scales', 'infinite'])
@pytest.mark.parametrize('n', [1, 2, 33, 256])
def test_the_kth_largest_is_that_of_a_sort(kind, n):
  x_BN = rows(kind, n)
  in_order = -np.sort(-x_BN, axis=1)
  for k in {1, 2, n // 2, n - 1, n} & set(range(1, n + 1)):
    got = jax.jit(ordered.kth_largest, static_argnums=1)(x_BN, k)
    np.testing.assert_array_equal(got, in_order[:, k - 1])


def test_fewer_bits_give_a_little_less():
  x_BN = rows('scales', 256)
  exact = np.asarray(ordered.kth_largest(x_BN, 9))
  got = np.asarray(ordered.kth_largest(x_BN, 9, bits=18))
  assert (got <= exact).all() and (exact - got <= 2.0**-9 * abs(exact)).all()
  # Control: all bits are needed for what is exact.
  assert (got != exact).all()
  assert (ordered.kth_largest(x_BN, 9, bits=31) != exact).any()


@pytest.mark.parametrize('kind', ['normal', 'ties', 'scales', 'zeros'])
@pytest.mark.parametrize('n', [1, 2, 3, 33, 256])
def test_medians_are_those_of_numpy(kind, n):
  x_BN = rows(kind, n)
  got = np.asarray(jax.jit(ordered.median)(x_BN))
  np.testing.assert_array_equal(got, np.median(x_BN, axis=1))
  of_more = ordered.median(jnp.asarray(x_BN[:6]).reshape(2, 3, n))
  np.testing.assert_array_equal(of_more, got[:6].reshape(2, 3))
