"""Sums of 48 bits, hashes and orders, which reducers are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as scipy_stats

from sae_jax.probing.scan import counter_hash, double, order
from sae_jax.probing.scan.double import Double

SIZE = 20_000


def numbers(seed):
  """float64 that have a form of two float32, and the form."""
  rng = np.random.default_rng(seed)
  hi = rng.lognormal(0, 6, SIZE).astype(np.float32)
  lo = (hi * rng.uniform(-1, 1, SIZE) * 2.0**-25).astype(np.float32)
  return hi.astype(np.float64) + lo, Double(jnp.asarray(hi), jnp.asarray(lo))


def error(ours, exact):
  return np.abs(double.to_float64(jax.device_get(ours)) / exact - 1).max()


@jax.jit
def naive_add(a, b):
  return Double(a.hi_N + b.hi_N, a.lo_N + b.lo_N)


def test_sums_have_46_bits_under_jit():
  a64, a = numbers(0)
  b64, b = numbers(1)
  assert error(jax.jit(double.add)(a, b), a64 + b64) < 2.0**-46
  # Two-sum that is simplified away leaves this.
  assert error(naive_add(a, b), a64 + b64) > 2.0**-30


def test_products_have_46_bits_under_jit():
  a64, a = numbers(2)
  b = np.random.default_rng(3).lognormal(0, 2, SIZE).astype(np.float32)
  a_hi = np.asarray(a.hi_N, np.float64)
  assert error(jax.jit(double.product)(a.hi_N, b), a_hi * b) < 2.0**-46
  assert error(jax.jit(double.scale)(a, b), a64 * b) < 2.0**-44
  assert error(double.of(a.hi_N * b), a_hi * b) > 2.0**-30


def test_a_long_sum_loses_nothing_that_counts():
  values = np.random.default_rng(4).gamma(1, 1, 30_000).astype(np.float32)

  @jax.jit
  def total(values):
    zero = double.of(jnp.float32(0))
    return jax.lax.scan(
      lambda sum_, value: (double.add(sum_, double.of(value)), None),
      zero,
      values,
    )[0]

  assert error(total(values), values.astype(np.float64).sum()) < 1e-12


def keys(rows, latents, seed):
  rows = np.asarray(rows, np.int64)
  return np.asarray(
    jax.jit(counter_hash.random_key, static_argnames='seed')(
      (rows >> 32).astype(np.uint32),
      (rows & 0xFFFFFFFF).astype(np.uint32),
      np.asarray(latents, np.int32),
      seed=seed,
    )
  )


GRID_ROWS = np.arange(1000)[:, None] + np.zeros(100, np.int64)
GRID_LATENTS = np.arange(100) + np.zeros((1000, 1), np.int64)


def least_p(of):
  """The least p-value of tests for uniformity, of what is too even too."""
  ps = []
  # Both ends of the word: a weak mix shows in one of them.
  for part in (of >> 24, of & 255):
    counts = np.bincount(part.reshape(-1), minlength=256)
    p = scipy_stats.chisquare(counts).pvalue
    ps += [p, 1 - p]
    # Of each latent and of each row too.
    for axis in (0, 1):
      sums = (part / 255 - 0.5).sum(axis) / np.sqrt(part.shape[axis] / 12)
      ps.append(scipy_stats.kstest(sums, 'norm').pvalue)
  return min(ps)


@pytest.mark.parametrize('first', [0, 2**32 - 500, 2**40])
@pytest.mark.parametrize('seed', [0, 1, 2**33])
def test_keys_are_uniform(first, seed):
  of = keys(GRID_ROWS + first, GRID_LATENTS, seed)
  assert least_p(of) > 1e-4
  # So many words of 32 bits have one or two equal pairs.
  assert len(np.unique(of)) > of.size - 10


def test_keys_that_are_not_mixed_are_noticed():
  weak = GRID_ROWS * 0xC2B2AE3D ^ GRID_LATENTS * 0x27D4EB2F
  assert least_p((weak & 0xFFFFFFFF).astype(np.uint32)) < 1e-4


def test_keys_of_other_rows_latents_and_seeds_have_nothing_in_common():
  rows, latents = GRID_ROWS[:, :50], GRID_LATENTS[:, :50]
  of = keys(rows, latents, 0)
  for other in (
    keys(rows + 1, latents, 0),
    keys(rows + 2**32, latents, 0),
    keys(rows, latents + 1, 0),
    keys(rows, latents, 1),
    keys(rows, latents, 2**32),
    keys(latents + 1000, rows, 0),
  ):
    same = (of == other).mean()
    assert same < 1e-3
    correlation = np.corrcoef(of.reshape(-1), other.reshape(-1))[0, 1]
    assert abs(correlation) < 5 / np.sqrt(of.size)
    # Half of the bits differ, each as often.
    bits = np.unpackbits((of ^ other).view(np.uint8).reshape(-1, 4), axis=1)
    assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(of.size)


@pytest.mark.parametrize('n_own', [5, 3000, 2**21])
def test_a_radix_sort_is_a_stable_sort(n_own):
  rng = np.random.default_rng(0)
  latent_BC = rng.integers(0, n_own + 1, (300, 16)).astype(np.int32)
  value_BC = rng.random((300, 16)).astype(np.float32)
  token_B = np.arange(300, dtype=np.int32)
  args = latent_BC, (value_BC,), (token_B,)
  fast = jax.jit(order._by_latent_cpu, static_argnums=3)(*args, n_own)
  plain = jax.jit(order._by_latent)(*args)
  places = np.argsort(latent_BC, axis=None, kind='stable')
  np.testing.assert_array_equal(fast[0], latent_BC.reshape(-1)[places])
  np.testing.assert_array_equal(fast[1], value_BC.reshape(-1)[places])
  np.testing.assert_array_equal(fast[2], places // 16)
  # That of a TPU leaves the slots of a token in any order: here a latent may
  # come twice, in codes it does not.
  np.testing.assert_array_equal(fast[0], plain[0])
  np.testing.assert_array_equal(fast[2], plain[2])


def test_the_chosen_slots_come_first():
  chosen_P = np.random.default_rng(0).random(1000) < 0.3
  slots = np.flatnonzero(chosen_P)
  for front in (order._front_cpu, order._front):
    of = np.asarray(jax.jit(front)(chosen_P))
    np.testing.assert_array_equal(of[: len(slots)], slots)
    assert (of[len(slots) :] == 1000).all()


def kinds(seed, size=3000):
  """Latents and documents, of which many come again."""
  rng = np.random.default_rng(seed)
  return rng.integers(0, (40, 30), (size, 2)).astype(np.int32).T


@pytest.mark.parametrize('name', ['_repeated', '_repeated_cpu'])
def test_what_comes_again_is_told_from_what_comes_first(name, monkeypatch):
  latent_C, document_C = kinds(1)
  _, first = np.unique(latent_C * 30 + document_C, return_index=True)
  want_C = np.ones(len(latent_C), bool)
  want_C[first] = False
  repeated = getattr(order, name)
  np.testing.assert_array_equal(jax.jit(repeated)(latent_C, document_C), want_C)
  # Where nearly all hashes are the same too.
  plain = order._hash
  monkeypatch.setattr(order, '_hash', lambda *args: plain(*args[:-1], 3))
  few = latent_C[:60], document_C[:60]
  np.testing.assert_array_equal(jax.jit(repeated)(*few), want_C[:60])


def test_what_another_of_its_kind_beats_is_found_by_hashes(monkeypatch):
  latent_P, document_P = kinds(2)
  key_P = np.random.default_rng(3).integers(0, 500, 3000).astype(np.uint32)
  kind_P = latent_P * 30 + document_P
  best = np.zeros(1200, np.uint32)
  np.maximum.at(best, kind_P, key_P)
  want_P = key_P < best[kind_P]
  args = latent_P, document_P, key_P
  beaten_P = np.asarray(jax.jit(order.beaten_cpu)(*args))
  assert not (beaten_P & ~want_P).any()
  assert beaten_P.sum() > 0.8 * want_P.sum()
  # Two kinds of one hash are told apart, so that fewer are found.
  plain = order._hash
  monkeypatch.setattr(order, '_hash', lambda *args: plain(*args[:-1], 100))
  fewer_P = np.asarray(jax.jit(lambda *args: order.beaten_cpu(*args))(*args))
  assert not (fewer_P & ~want_P).any()
  assert 0 < fewer_P.sum() < beaten_P.sum()
