"""Kernels that move rows: sums, races, mistakes that must be seen."""

import functools

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import ml_dtypes
import numpy as np
import pytest

from sae_jax import errors
from sae_jax import mesh as mesh_lib
from sae_jax.ops import chip, row_copies
from sae_jax.ops.decode import kernel as decode_kernel
from sae_jax.ops.decode import tiles as decode_tiles
from sae_jax.ops.weight_grad import kernel as grad_kernel
from sae_jax.ops.weight_grad import tiles as grad_tiles

BF16 = jnp.bfloat16
NOWHERE = 10**9


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
  """Parts and blocks small enough that few rows make many of them."""
  if 'real_sizes' in request.fixturenames:
    return
  monkeypatch.setattr(row_copies, 'PART', 32)
  monkeypatch.setattr(row_copies, '_GROUP', 8)
  monkeypatch.setattr(grad_tiles, '_PAIRS', (64,))
  monkeypatch.setattr(grad_tiles, '_LATENTS', ((0, 16),))


@pytest.fixture
def real_sizes():
  """Parts and blocks as on chips."""


def unrolled(monkeypatch):
  """The copies one after another, as chips are given them, in no loop."""
  overlap = row_copies.overlap
  monkeypatch.setattr(
    row_copies, 'overlap', lambda *a, **k: overlap(*a, **k | {'unroll': True})
  )


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


@pytest.mark.fast
@pytest.mark.parametrize('name', SLOTS)
def test_sums_and_products_are_those_of_float64(name):
  slots = Slots(*SLOTS[name])
  assert close(slots.sums(interpret=True), slots.want_sums())
  products = np.asarray(slots.products(interpret=True))
  assert close(products, slots.want_products())
  assert (products[~slots.real] == 0).all()


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


@pytest.mark.fast
def test_blocks_of_several_chunks_and_cores(monkeypatch):
  two_cores(monkeypatch)
  slots = Slots(8, 150, (150, 3, 70, 0, 128), 40, 128)
  chunks_of(monkeypatch, 64, 128, 8)
  plan = decode_tiles.plan(5, 150, 128, 8)
  assert (plan.chunks, plan.slots, plan.cores) == (3, 64, 2)
  assert close(slots.sums(interpret=True), slots.want_sums())
  assert close(slots.products(interpret=True), slots.want_products())


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


@pytest.mark.fast
@pytest.mark.parametrize('cores', [1, 2])
def test_segment_sums_are_those_of_float64(monkeypatch, cores):
  monkeypatch.setattr(chip, 'cores', lambda: cores)
  run = jax.jit(functools.partial(segment_sums, 50, 2, interpret=True))
  for latents in LATENTS.values():
    pairs = Pairs(latents, 200, 50, 23, 128)
    assert is_right(pairs, run(*pairs.poisoned(), pairs.count))


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


@pytest.mark.fast
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


@pytest.fixture
def races():
  yield lambda: interpret_pallas_call.races.races_found
  pltpu.reset_tpu_interpret_mode_state()


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


def test_shards_of_latents_add_up():
  slots = Slots(8, 40, (40, 21), 20, 128)
  # One shard has the front part of the slots, the other the rest; so that
  # each knows how many pairs it has, and no other.
  fronts = slots.count // 3
  # The plain interpreter of jax 0.10 does not know what varies.
  interpret = pltpu.InterpretParams()

  def run(w_ND):
    first = jax.lax.axis_index('latent') == 0
    count = jnp.where(first, fronts, slots.count - fronts)
    start = jnp.where(first, 0, fronts)[:, None]
    order = (jnp.arange(40) + start) % 40
    rows, token, weights = (
      jnp.take_along_axis(a, order, axis=1)
      for a in (slots.rows, slots.token, slots.weights)
    )
    common = dict(block_tokens=8, interpret=interpret)
    sums = decode_kernel.gather_sum(rows, token, weights, count, w_ND, **common)
    products = decode_kernel.sampled_products(
      rows, token, count, slots.g, w_ND, **common
    )
    real = jnp.arange(40) < count[:, None]
    order = jnp.argsort(jnp.where(real, rows, 20).reshape(-1))
    latent_P = jnp.where(real, rows, 20).reshape(-1)[order]
    row_P = (token + jnp.array([[0], [8]])).reshape(-1)[order]
    weights_P = products.reshape(-1)[order]
    (grad_ND,), _ = grad_kernel.segment_sums(
      latent_P, row_P, [weights_P], [slots.g], 20, count.sum(),
      interpret=interpret,
    )  # fmt: skip
    return jax.lax.psum((sums, grad_ND), 'latent')

  line = mesh_lib.make_mesh(1, 2, jax.devices()[:2])
  spec = PartitionSpec()
  mapped = jax.shard_map(run, mesh=line, in_specs=spec, out_specs=spec)
  sums, grad_ND = jax.jit(mapped)(slots.w)
  want_ND = np.zeros((20, 128))
  pulled = slots.want_products()[..., None] * slots.g[slots.place]
  np.add.at(want_ND, slots.rows[slots.real], pulled[slots.real])
  assert close(sums, slots.want_sums())
  assert close(grad_ND, want_ND)


@pytest.mark.fast
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
    decode_tiles.plan(4, 512, 2**17, 8)
  with pytest.raises(errors.UserError, match=r'use larger blocks'):
    decode_tiles.plan(2**18, 8, 128, 8)
  with pytest.raises(errors.UserError, match=r'130 must be .* use 256'):
    segment_sums(4, 1, None, None, np.zeros((1, 8)), np.zeros((1, 4, 130)), 0)
  with pytest.raises(errors.UserError, match=r'2 weights and 1 tables'):
    segment_sums(4, 2, None, None, np.zeros((2, 8)), np.zeros((1, 4, 128)), 0)
  with pytest.raises(errors.UserError, match=r'of SMEM.*smaller batch'):
    grad_tiles.plan(2**25, 2**25, 64, 128, 2, 1)
  with pytest.raises(errors.UserError, match=r'of VMEM and there are'):
    grad_tiles.plan(64, 64, 64, 2**18, 2, 1)
