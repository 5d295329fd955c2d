"""Products of rows that are rounded alike, and candidates that they order."""

import jax
import numpy as np
import pytest

from sae_jax.probing import dots

RNG = np.random.default_rng(0)


@pytest.mark.parametrize('width', [1, 16, 64, 65, 768])
def test_a_product_is_that_of_float64_wherever_the_row_is(width):
  a_ND, b_ND = RNG.standard_normal((2, 37, width)).astype(np.float32)
  dot = jax.jit(dots.dot)
  got_N = np.asarray(dot(a_ND, b_ND))
  want_N = (a_ND.astype(np.float64) * b_ND).sum(-1)
  np.testing.assert_allclose(got_N, want_N, rtol=0, atol=1e-6 * width**0.5)
  for part in (slice(0, 1), slice(3, 20), slice(11, 37)):
    np.testing.assert_array_equal(dot(a_ND[part], b_ND[part]), got_N[part])


def test_rows_of_any_length_become_unit_rows():
  lengths = np.array([1e-30, 1e-3, 1, 1e30, 0])
  w_ND = RNG.standard_normal((5, 20))
  unit_ND = dots.unit((w_ND * lengths[:, None]).astype(np.float32))
  want_ND = w_ND / np.linalg.norm(w_ND, axis=1, keepdims=True)
  want_ND[4] = 0
  np.testing.assert_allclose(unit_ND, want_ND, rtol=1e-5)


@pytest.mark.parametrize(('error', 'right'), [(3, True), (20, False)])
def test_a_rough_product_only_proposes(error, right):
  row_1D = np.ones((1, 4), np.float32)
  others_KD = np.repeat(np.arange(40, dtype=np.float32)[:, None], 4, 1)
  rough_1K = (row_1D @ others_KD.T).copy()
  # The best is so many places too low; with too many it is lost.
  rough_1K[0, 39] = rough_1K[0, 39 - error] - 1
  products, places = dots.candidates(rough_1K, row_1D, others_KD, 2)
  values, ids = dots.largest(products, places, 2)
  assert (ids.tolist() == [[39, 38]]) is right
  assert (values.tolist() == [[156, 152]]) is right


def test_equal_values_go_to_the_lower_id():
  values = np.float32([[1, 2, -0.0, 2, 0, -np.inf]])
  _, ids = dots.largest(values, np.int32([[7, 9, 5, 3, 4, 0]]), 5)
  assert ids.tolist() == [[3, 9, 7, 4, 5]]
