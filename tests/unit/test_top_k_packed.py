"""The top k for CPUs against a stable sort: values, ties, what does not fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import ops
from sae_jax.ops.top_k import packed
from tests.support.programs import QUICKLY
from tests.support.top_k_checks import stable_top_k


def with_ties(rng, shape):
  # Of some rows the k-th and the next are equal, in one run and in others.
  return rng.integers(-100, 100, shape)


def one_run(rng, shape):
  return np.where(np.arange(shape[1]) // 16 == 3, 9, rng.random(shape))


def last_run(rng, shape):
  # All slots are needed, and the best entries are in the last ones.
  places = np.arange(shape[1]) // 16
  return np.where(places == places[-1], 9, rng.random(shape))


def mostly_nothing(rng, shape):
  return np.where(rng.random(shape) < 0.05, rng.standard_normal(shape), -np.inf)


ROWS = {
  'random': lambda rng, shape: rng.standard_normal(shape),
  'ties': with_ties,
  'all equal': lambda rng, shape: np.zeros(shape),
  'negative': lambda rng, shape: -rng.exponential(size=shape) - 1,
  'tiny': lambda rng, shape: rng.standard_normal(shape) * 1e-30,
  'one run': one_run,
  'last run': last_run,
  'mostly nothing': mostly_nothing,
  'ascending': lambda rng, shape: np.tile(np.arange(shape[1]), (shape[0], 1)),
}
# Of the last rows the last run is not full.
SHAPES = [(40, 1024, 16), (64, 512, 1), (30, 1003, 8)]


@functools.partial(jax.jit, static_argnames='k', compiler_options=QUICKLY)
def pack(x_BN, k):
  return packed.top_k(x_BN, k)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('name', ROWS)
def test_packed_top_k_equals_a_stable_sort(name, shape):
  *shape, k = shape
  x_BN = ROWS[name](np.random.default_rng(1), shape).astype(np.float32)
  assert packed.takes(jnp.asarray(x_BN), k)
  got, want = pack(x_BN, k), stable_top_k(x_BN, k)
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_array_equal(got[1], want[1])


@pytest.mark.parametrize('number', [np.nan, -np.nan, np.inf, -np.inf, -0.0])
def test_numbers_that_are_no_numbers_are_ordered_as_by_xla(number):
  x_BN = np.random.default_rng(2).standard_normal((20, 512)).astype(np.float32)
  x_BN[3, 100:105] = number
  x_BN[7, :] = number
  got, want = pack(x_BN, 8), jax.lax.top_k(x_BN, 8)
  np.testing.assert_array_equal(got[1], want[1])
  # The signs of zeros too.
  for one, other in zip(got[0], want[0]):
    np.testing.assert_array_equal(one.view(np.int32), other.view(np.int32))


def test_whole_rows_are_sorted_where_too_many_reach_the_bound(monkeypatch):
  sort = packed.reference.sorted_top_k

  def no_whole_rows(x_BN, k):
    vals_BK, idx_BK = sort(x_BN, k)
    return vals_BK * (x_BN.shape[1] < 1024), idx_BK

  monkeypatch.setattr(packed.reference, 'sorted_top_k', no_whole_rows)
  x_BN = np.random.default_rng(3).random((40, 1024), np.float32)
  vals_BK, _ = jax.jit(lambda x_BN: packed.top_k(x_BN, 16))(x_BN)
  np.testing.assert_array_equal(vals_BK, stable_top_k(x_BN, 16)[0])
  # One row of them is enough.
  x_BN[5] = 0.5
  vals_BK, _ = jax.jit(lambda x_BN: packed.top_k(x_BN, 16))(x_BN)
  assert not vals_BK.any()


def test_its_gradient_is_that_of_the_entries_taken():
  rng = np.random.default_rng(4)
  x_BN = rng.standard_normal((12, 1024)).astype(np.float32)
  g_BK = rng.standard_normal((12, 16)).astype(np.float32)
  got_BN, want_BN = (
    jax.jit(
      jax.grad(lambda x_BN, of=of: (of(x_BN, 16)[0] * g_BK).sum()),
      compiler_options=QUICKLY,
    )(x_BN)
    for of in (packed.top_k, jax.lax.top_k)
  )
  np.testing.assert_array_equal(got_BN, want_BN)


def test_wide_rows_and_long_ones_take_it(monkeypatch):
  taken = []
  top_k = packed.top_k

  def record(x_BN, k):
    taken.append(x_BN.shape[1])
    return top_k(x_BN, k)

  monkeypatch.setattr(packed, 'top_k', record)
  for n in (100, 1024, 20_000):
    x_BN = np.random.default_rng(5).random((3, n), np.float32)
    got, want = ops.top_k(x_BN, 8), stable_top_k(x_BN, 8)
    np.testing.assert_array_equal(got[1], want[1])
  # Of 20,000 entries the maxima of 1,024 buckets, and those of eight buckets,
  # of which runs would be too short.
  assert taken == [1024, 1024]


def test_control_a_run_that_is_off_by_one_is_seen(monkeypatch):
  place = packed._place_of_bit

  def next_bit(word_BS, nth_BS, width):
    return (place(word_BS, nth_BS, width) + 1) % width

  monkeypatch.setattr(packed, '_place_of_bit', next_bit)
  x_BN = np.random.default_rng(1).random((40, 1024), np.float32)
  got = jax.jit(lambda x_BN: packed.top_k(x_BN, 16))(x_BN)
  assert (got[1] != stable_top_k(x_BN, 16)[1]).any()
