"""Kernels that move rows: sums, and which rows they visit."""

import functools

import jax
import numpy as np
import pytest

from sae_jax import errors, ops
from sae_jax.ops import chip, pairs
from sae_jax.ops.decode import kernel as decode_kernel
from sae_jax.ops.decode import tiles as decode_tiles
from sae_jax.ops.weight_grad import kernel as grad_kernel
from sae_jax.ops.weight_grad import tiles as grad_tiles
from tests.support.programs import QUICKLY
from tests.support.row_sums import (
  chunks_of,
  close,
  is_right,
  LATENTS,
  make_small,
  Pairs,
  segment_sums,
  SLOTS,
  Slots,
  traced_anew,
  two_cores,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  make_small(monkeypatch)
  with traced_anew():
    yield


@functools.partial(
  jax.jit, static_argnames='block_tokens', compiler_options=QUICKLY
)
def both(rows, token, weights, count, g, w, block_tokens):
  options = {'block_tokens': block_tokens, 'interpret': True}
  return (
    decode_kernel.gather_sum(rows, token, weights, count, w, **options),
    decode_kernel.sampled_products(rows, token, count, g, w, **options),
  )


def sums_and_products(slots):
  """Both of `Slots`, from one program."""
  arrays = *slots.poisoned(), slots.count, slots.g, slots.w
  sums, products = both(*arrays, slots.tokens)
  return np.asarray(sums), np.asarray(products)


@pytest.mark.parametrize('name', SLOTS)
def test_sums_and_products_are_those_of_float64(name):
  slots = Slots(*SLOTS[name])
  sums, products = sums_and_products(slots)
  assert close(sums, slots.want_sums())
  assert close(products, slots.want_products())
  assert (products[~slots.real] == 0).all()


def test_zeros_are_passed_over_where_few_are_active(monkeypatch):
  rng = np.random.default_rng(3)
  vals_BK = rng.standard_normal((40, 12)).astype(np.float32)
  vals_BK *= rng.random((40, 12)) < 0.1
  idx_BK = rng.integers(0, 64, (40, 12)).astype(np.int32)
  w_ND = rng.standard_normal((64, 128)).astype(np.float32)
  packed, real = [], pairs.blocks

  def blocks(*args, pack):
    packed.append(pack)
    return real(*args, pack=pack)

  monkeypatch.setattr(pairs, 'blocks', blocks)
  sums = ops.decode(vals_BK, idx_BK, w_ND, implementation='pallas', active=0.1)
  want = np.einsum('bk,bkd->bd', vals_BK.astype(float), w_ND[idx_BK])
  assert close(np.asarray(sums), want)
  assert packed == [True]


def test_blocks_of_several_chunks_and_cores(monkeypatch):
  two_cores(monkeypatch)
  slots = Slots(8, 150, (150, 3, 70, 0, 128), 40, 128)
  chunks_of(monkeypatch, 64, 128, 8)
  plan = decode_tiles.choose(5, 150, 128, 8)
  assert (plan.chunks, plan.slots, plan.cores) == (3, 64, 2)
  sums, products = sums_and_products(slots)
  assert close(sums, slots.want_sums())
  assert close(products, slots.want_products())


@pytest.mark.parametrize('cores', [1, 2])
def test_segment_sums_are_those_of_float64(monkeypatch, cores):
  monkeypatch.setattr(chip, 'cores', lambda: cores)
  run = jax.jit(
    functools.partial(segment_sums, 50, 2, interpret=True),
    compiler_options=QUICKLY,
  )
  for latents in LATENTS.values():
    pairs = Pairs(latents, 200, 50, 23, 128)
    assert is_right(pairs, run(*pairs.poisoned(), pairs.count))


def visits(find, plan, latents, n_pairs, n):
  """(core, chunk, block) of every item, in order."""
  latent_P = np.full(-(-n_pairs // plan.pairs) * plan.pairs, n, np.int32)
  latent_P[: len(latents)] = np.sort(latents)
  items = find(latent_P.reshape(-1, plan.pairs), len(latents))
  bounds = np.asarray(items.bounds)
  core = np.searchsorted(bounds, np.arange(bounds[-1]), side='right') - 1
  return [
    (int(c), int(chunk), int(block))
    for c, chunk, block in zip(core, items.chunk_I, items.block_I)
  ]


@pytest.mark.parametrize('n_pairs, n', [(200, 50), (700, 290), (30, 400)])
@pytest.mark.parametrize('cores', [1, 2])
def test_items_are_the_chunks_that_a_block_has_pairs_in(cores, n_pairs, n):
  rng = np.random.default_rng(0)
  plan = grad_tiles.Layout(pairs=64, latents=16, cores=cores, vmem_bytes=0)
  find = jax.jit(
    lambda latent_CP, count: grad_kernel._items(plan, latent_CP, count, n)
  )
  cases = [latents[:n_pairs] for latents in LATENTS.values()]
  for _ in range(30):
    held = rng.integers(0, n, rng.integers(1, n))
    cases.append(rng.choice(held, rng.integers(0, n_pairs + 1)))
  for latents in cases:
    found = visits(find, plan, latents, n_pairs, n)
    needed = {(p // 64, l // 16) for p, l in enumerate(np.sort(latents))}
    places = [(chunk, block) for _, chunk, block in found]
    assert needed <= set(places)
    assert sorted(set(places)) == places
    # A block has one writer, which comes to it once; time follows the count.
    blocks = [(core, block) for core, _, block in found]
    runs = [b for b, before in zip(blocks, [None, *blocks]) if b != before]
    assert [block for _, block in runs] == list(range(-(-n // 16)))
    assert {core for core, _, _ in found} == set(range(cores))
    assert len(found) <= -(-n // 16) + len(latents) // 64


def test_errors_say_what_to_do():
  slots = Slots(8, 8, (8,), 4, 128)
  with pytest.raises(errors.UserError, match=r'multiple of 128.*: use 256'):
    decode_kernel.gather_sum(
      slots.rows, slots.token, slots.weights, slots.count,
      np.zeros((4, 130), np.float32), block_tokens=8,
    )  # fmt: skip
  with pytest.raises(errors.UserError, match=r'12 must be a multiple of 8'):
    decode_kernel.gather_sum(
      slots.rows, slots.token, slots.weights, slots.count, slots.w,
      block_tokens=12,
    )  # fmt: skip
  with pytest.raises(errors.UserError, match=r'float64 are not copied'):
    decode_kernel.gather_sum(
      slots.rows, slots.token, slots.weights, slots.count,
      slots.w.astype(np.float64), block_tokens=8,
    )  # fmt: skip
  with pytest.raises(errors.UserError, match=r'VMEM and there are .*smaller'):
    decode_tiles.choose(4, 512, 2**17, 8)
  with pytest.raises(errors.UserError, match=r'use larger blocks'):
    decode_tiles.choose(2**18, 8, 128, 8)
  with pytest.raises(errors.UserError, match=r'130 must be .* use 256'):
    segment_sums(4, 1, None, None, np.zeros((1, 8)), np.zeros((1, 4, 130)), 0)
  with pytest.raises(errors.UserError, match=r'2 weights and 1 tables'):
    segment_sums(4, 2, None, None, np.zeros((2, 8)), np.zeros((1, 4, 128)), 0)
  with pytest.raises(errors.UserError, match=r'of SMEM.*smaller batch'):
    grad_tiles.choose(2**25, 2**25, 64, 128, 2, 1)
  with pytest.raises(errors.UserError, match=r'of VMEM and there are'):
    grad_tiles.choose(64, 64, 64, 2**18, 2, 1)
