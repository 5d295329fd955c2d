"""Sums over rows that kernels make, and their references in float64."""

import contextlib
import functools

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from sae_jax.ops import chip, row_copies
from sae_jax.ops.decode import kernel as decode_kernel
from sae_jax.ops.decode import tiles as decode_tiles
from sae_jax.ops.weight_grad import kernel as grad_kernel
from sae_jax.ops.weight_grad import tiles as grad_tiles

BF16 = jnp.bfloat16
NOWHERE = 10**9


@contextlib.contextmanager
def traced_anew():
  """Kernels are traced in here, and again after it.

  What a test puts in the place of their parts is else hidden by an earlier
  trace at the same shapes, or seen by a later test.
  """
  kernels = decode_kernel._run, grad_kernel._run
  for kernel in kernels:
    kernel.clear_cache()
  yield
  for kernel in kernels:
    kernel.clear_cache()


def make_small(monkeypatch):
  """Parts and blocks small enough that few rows make many of them."""
  monkeypatch.setattr(row_copies, 'PART', 32)
  monkeypatch.setattr(row_copies, '_GROUP', 8)
  monkeypatch.setattr(grad_tiles, '_PAIRS', (64,))
  monkeypatch.setattr(grad_tiles, '_LATENTS', ((0, 16),))


def two_cores(monkeypatch):
  monkeypatch.setattr(chip, 'cores', lambda: 2)


def chunks_of(monkeypatch, n_rows, d_model, tokens):
  """Makes VMEM hold two buffers of so many rows, and no more."""
  fixed = decode_tiles._fixed_bytes(d_model, tokens)
  vmem = (fixed + 8 * d_model * n_rows) / decode_tiles._VMEM_SHARE
  monkeypatch.setattr(chip, 'vmem_bytes', lambda: vmem)


def rounded(array, dtype):
  kind = ml_dtypes.bfloat16 if dtype == BF16 else np.float32
  return np.asarray(array, np.float32).astype(kind).astype(np.float64)


class Slots:
  """Blocks of slots with references in float64; padding is poisoned."""

  def __init__(self, tokens, n_slots, counts, n, d, seed=0):
    rng = np.random.default_rng(seed)
    shape = len(counts), n_slots
    self.tokens = tokens
    self.count = np.asarray(counts, np.int32)
    self.rows = rng.integers(0, n, shape).astype(np.int32)
    self.token = rng.integers(0, tokens, shape).astype(np.int32)
    # The same row twice for one token must add up.
    self.rows[:, 1:2], self.token[:, 1:2] = self.rows[:, :1], self.token[:, :1]
    self.weights = rng.standard_normal(shape).astype(np.float32)
    self.w = rng.standard_normal((n, d)).astype(np.float32)
    self.g = rng.standard_normal((len(counts) * tokens, d)).astype(np.float32)
    self.real = np.arange(n_slots) < self.count[:, None]
    self.place = self.token + tokens * np.arange(len(counts))[:, None]

  def poisoned(self):
    return (
      np.where(self.real, self.rows, NOWHERE).astype(np.int32),
      np.where(self.real, self.token, -5).astype(np.int32),
      np.where(self.real, self.weights, np.nan).astype(np.float32),
    )

  def sums(self, dtype=None, **options):
    rows, token, weights = self.poisoned()
    return decode_kernel.gather_sum(
      rows, token, weights, self.count, self.w, block_tokens=self.tokens,
      dtype=dtype, **options,
    )  # fmt: skip

  def products(self, dtype=None, **options):
    rows, token, _ = self.poisoned()
    return decode_kernel.sampled_products(
      rows, token, self.count, self.g, self.w, block_tokens=self.tokens,
      dtype=dtype, **options,
    )  # fmt: skip

  def want_sums(self, dtype=None):
    want = np.zeros(self.g.shape)
    weights, w = rounded(self.weights, dtype), rounded(self.w, dtype)
    np.add.at(
      want,
      self.place[self.real],
      weights[self.real][:, None] * w[self.rows[self.real]],
    )
    return want

  def want_products(self, dtype=None):
    w, g = rounded(self.w, dtype), rounded(self.g, dtype)
    products = np.einsum('grd,grd->gr', g[self.place], w[self.rows])
    return np.where(self.real, products, 0)


def close(got, want, tolerance=1e-5):
  scale = np.abs(want).max() or 1.0
  return np.abs(np.asarray(got, np.float64) - want).max() <= tolerance * scale


# Tokens of a block, slots, real ones of each block, N, D.
SLOTS = {
  'one active': (8, 8, (8, 8, 5), 20, 128),
  'many active': (8, 8 * 512, (8 * 512,), 2000, 128),
  'ragged': (16, 100, (100, 0, 33, 64), 40, 384),
  'none real': (8, 8, (0, 0, 0), 20, 128),
  'wide': (16, 64, (64, 7), 40, 768),
}


class Pairs:
  """Pairs sorted by latent, with references in float64."""

  def __init__(self, latents, n_pairs, n, batch, d, seed=0):
    rng = np.random.default_rng(seed)
    count = len(latents)
    self.n, self.count = n, count
    self.latent = n + np.arange(n_pairs, dtype=np.int32)
    self.latent[:count] = np.sort(latents)
    self.row = rng.integers(0, batch, n_pairs).astype(np.int32)
    self.weights = rng.standard_normal((2, n_pairs)).astype(np.float32)
    self.tables = rng.standard_normal((2, batch, d)).astype(np.float32)

  def poisoned(self):
    real = np.arange(len(self.row)) < self.count
    return (
      self.latent,
      np.where(real, self.row, NOWHERE).astype(np.int32),
      np.where(real, self.weights, np.nan).astype(np.float32),
      self.tables,
    )

  def sums(self, n_tables=2, **options):
    run = functools.partial(segment_sums, self.n, n_tables, **options)
    return run(*self.poisoned(), self.count)

  def want(self, n_tables=2, dtype=None):
    latent, row = self.latent[: self.count], self.row[: self.count]
    weights = rounded(self.weights, dtype)[:, : self.count]
    tables = rounded(self.tables, dtype)
    grads = np.zeros((n_tables, self.n, tables.shape[2]))
    for grad, weight, table in zip(grads, weights, tables):
      np.add.at(grad, latent, weight[:, None] * table[row])
    totals = np.zeros((n_tables, self.n))
    for total, weight in zip(totals, self.weights):
      np.add.at(total, latent, weight[: self.count])
    return grads, totals


def segment_sums(n, n_tables, latent, row, weights, tables, count, **options):
  grads, totals = grad_kernel.segment_sums(
    latent, row, tuple(weights[:n_tables]), tuple(tables[:n_tables]), n, count,
    **options,
  )  # fmt: skip
  return jnp.stack(grads), jnp.stack(totals)


def spread(count, n, seed=1):
  return np.random.default_rng(seed).integers(0, n, count)


# Latents of the real pairs among 50; there may be 200 pairs.
LATENTS = {
  'spread': spread(200, 50),
  'some real': spread(131, 50),
  'a whole chunk': spread(64, 50),
  'few': np.array([3, 17, 49]),
  'none': np.zeros(0, int),
  'all on one': np.full(200, 21),
  'all on the last': np.full(77, 49),
  'blocks and chunks begin together': np.repeat([0, 16, 32, 48], 50)[:192],
  'gaps': np.repeat([1, 47], 70),
}


def is_right(pairs, found, n_tables=2, dtype=None):
  (grads, totals), (want, want_totals) = found, pairs.want(n_tables, dtype)
  empty = np.setdiff1d(np.arange(pairs.n), pairs.latent[: pairs.count])
  return (
    close(grads, want)
    and close(totals, want_totals)
    and (np.asarray(grads)[:, empty] == 0).all()
    and (np.asarray(totals)[:, empty] == 0).all()
  )
