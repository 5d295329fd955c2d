"""Kernels that move rows: real sizes, races, mistakes that must be seen."""

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.ops import chip, row_copies
from sae_jax.ops.weight_grad import kernel as grad_kernel
from tests.support.row_sums import (
  BF16,
  chunks_of,
  close,
  is_right,
  make_small,
  Pairs,
  SLOTS,
  Slots,
  spread,
  traced_anew,
)


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
  if 'real_sizes' not in request.fixturenames:
    make_small(monkeypatch)
  with traced_anew():
    yield


@pytest.fixture
def real_sizes():
  """Parts and blocks as on chips."""


def unrolled(monkeypatch):
  """The copies one after another, as chips are given them, in no loop."""
  overlap = row_copies.overlap
  monkeypatch.setattr(
    row_copies, 'overlap', lambda *a, **k: overlap(*a, **k | {'unroll': True})
  )


@pytest.mark.parametrize('dtype', [BF16, jnp.float32])
def test_factors_are_rounded_and_sums_are_not(dtype):
  slots = Slots(*SLOTS['ragged'])
  for got, want in (
    (slots.sums, slots.want_sums),
    (slots.products, slots.want_products),
  ):
    found = got(dtype, interpret=True)
    assert close(found, want(dtype))
    assert close(found, want()) == (dtype != BF16)


def test_a_weight_that_is_no_number_spoils_its_token_alone():
  slots = Slots(8, 64, (64, 40), 30, 128)
  slots.weights[0, 5] = np.nan
  spoiled = np.zeros(16, bool)
  spoiled[slots.place[0, 5]] = True
  sums = np.asarray(slots.sums(interpret=True))
  np.testing.assert_array_equal(np.isnan(sums).any(1), spoiled)
  slots.g[slots.place[0, 5]] = np.nan
  products = np.asarray(slots.products(interpret=True))
  touched = slots.real & spoiled[slots.place]
  np.testing.assert_array_equal(np.isnan(products), touched)


def test_slots_in_parts_of_real_size(real_sizes):
  slots = Slots(8, 300, (300, 129), 200, 128)
  assert close(slots.sums(interpret=True), slots.want_sums())
  assert close(slots.products(interpret=True), slots.want_products())


@pytest.mark.parametrize('n_tables', [1, 2])
@pytest.mark.parametrize('expected', [None, 5])
def test_segment_sums_of_rounded_factors(n_tables, expected):
  pairs = Pairs(spread(131, 50), 200, 50, 23, 384)
  # Packed where there are more pairs than tokens, each alone otherwise.
  options = dict(dtype=BF16, expected=expected, interpret=True)
  found = pairs.sums(n_tables, **options)
  assert is_right(pairs, found, n_tables, BF16)
  assert not is_right(pairs, found, n_tables)


@pytest.mark.parametrize(
  'latents, n_pairs, n, batch, d',
  [
    (spread(5, 3), 5, 3, 5, 128),
    (spread(8 * 512, 100), 8 * 512, 100, 8, 128),
    (spread(60, 33), 60, 33, 60, 768),
  ],
)
def test_segment_sums_of_other_shapes(latents, n_pairs, n, batch, d):
  pairs = Pairs(latents, n_pairs, n, batch, d)
  assert is_right(pairs, pairs.sums(1, interpret=True), 1)


def test_pairs_in_parts_of_real_size(real_sizes):
  pairs = Pairs(spread(1100, 700), 1300, 700, 50, 128)
  assert is_right(pairs, pairs.sums(interpret=True))


def test_a_weight_that_is_no_number_spoils_its_latent_alone():
  pairs = Pairs(spread(131, 50), 200, 50, 23, 128)
  pairs.weights[:, 40] = np.nan
  grads, totals = pairs.sums(interpret=True)
  spoiled = np.arange(50) == pairs.latent[40]
  np.testing.assert_array_equal(np.isnan(totals), [spoiled] * 2)
  np.testing.assert_array_equal(np.isnan(grads).any(2), [spoiled] * 2)


def watched(cores=1, **more):
  return pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory='nan',
    out_of_bounds_reads='raise',
    num_cores_or_threads=cores,
    **more,
  )


@pytest.mark.parametrize('cores', [1, 2])
def test_blocks_of_slots_do_not_race(races, monkeypatch, cores):
  monkeypatch.setattr(chip, 'cores', lambda: cores)
  if cores == 1:
    unrolled(monkeypatch)
  slots = Slots(8, 70, (70, 0, 33), 20, 128)
  chunks_of(monkeypatch, 64, 128, 8)
  assert close(slots.sums(interpret=watched(cores)), slots.want_sums())
  assert not races()
  assert close(slots.products(interpret=watched(cores)), slots.want_products())
  assert not races()


@pytest.mark.parametrize('cores', [1, 2])
def test_segment_sums_do_not_race(races, monkeypatch, cores):
  monkeypatch.setattr(chip, 'cores', lambda: cores)
  if cores == 1:
    unrolled(monkeypatch)
  pairs = Pairs(spread(139, 41), 150, 41, 13, 128)
  found = pairs.sums(dtype=BF16, interpret=watched(cores))
  assert is_right(pairs, found, dtype=BF16)
  assert not races()


@pytest.mark.parametrize('kernel', ['slots', 'pairs'])
def test_control_a_copy_that_is_not_waited_for_is_a_race(
  races, monkeypatch, kernel
):
  monkeypatch.setattr(row_copies, '_wait', lambda *_: None)
  # The copies themselves are made at once, so that the sums are right.
  options = dict(interpret=watched(dma_execution_mode='eager'))
  try:
    if kernel == 'slots':
      slots = Slots(8, 64, (64, 64), 20, 128)
      assert close(slots.sums(**options), slots.want_sums())
    else:
      pairs = Pairs(spread(128, 41), 128, 41, 13, 128)
      assert is_right(pairs, pairs.sums(**options))
    raced = races()
  except jax.errors.JaxRuntimeError as error:
    # jax 0.12 raises where 0.10 takes note.
    raced = 'RACE DETECTED' in str(error)
  assert raced


def test_control_rows_that_were_not_copied_are_seen(races, monkeypatch):
  monkeypatch.setattr(row_copies, '_masked', lambda rows_RW, _: rows_RW)
  slots = Slots(8, 64, (40,), 20, 128)
  assert not np.isfinite(slots.sums(interpret=watched())).all()
  pairs = Pairs(spread(40, 41), 64, 41, 13, 128)
  assert not np.isfinite(pairs.sums(interpret=watched())[0]).all()


MISTAKES = {
  'parts of a chunk that begin before the block are left out': (
    grad_kernel,
    '_span',
    lambda real: lambda *a: (real(*a)[0], real(*a)[1] - 1),
  ),
  'a chunk has no second block': (
    grad_kernel,
    '_place',
    lambda real: lambda items, core, step: real(items, core, step + (step > 1)),
  ),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_control_mistakes_in_the_plan_are_seen(monkeypatch, name):
  where, attribute, mistaken = MISTAKES[name]
  monkeypatch.setattr(where, attribute, mistaken(getattr(where, attribute)))
  pairs = Pairs(spread(200, 50), 200, 50, 23, 128)
  assert not is_right(pairs, pairs.sums(interpret=True))
