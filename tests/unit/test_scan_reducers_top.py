"""The best pairs of each latent: exact in any batching, order, shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.probing.scan import best, order, reducers
from sae_jax.probing.scan import pairs as pairs_lib
from sae_jax.probing.scan.reducers import top as top_lib
from tests.support import pair_streams

N, M = 24, 5
BATCH = pair_streams.BATCH
TOP = reducers.Top('top', M, group='document')
RANDOM = reducers.Top('random', M, key='random', seed=3)
NEAR = reducers.Top('near', M)
REDUCERS = {'top': TOP, 'random': RANDOM, 'near': NEAR}


def bits(latent, row, value):
  del latent, row
  return np.float32(value).view(np.uint32)


def hashed(latent, row, value):
  """The counter hash in plain integers."""
  del value
  word = 2**32

  def mix(x):
    x ^= x >> 16
    x = x * 0x85EBCA6B % word
    x ^= x >> 13
    x = x * 0xC2B2AE35 % word
    return x ^ x >> 16

  x = RANDOM.seed + 0x9E3779B9
  for number, factor in (
    (0, 0x9E3779B9),
    (latent, 0x27D4EB2F),
    (row // word, 0xC2B2AE3D),
    (row % word, 0x85EBCA77),
  ):
    x = (mix(x ^ number * factor % word) + 0x9E3779B9) % word
  return mix(x)


KEYS = {'top': bits, 'random': hashed, 'near': bits}


@pytest.fixture(scope='module')
def codes():
  """Values that come often, one of them subnormal; documents come back."""
  values = [*np.linspace(0.5, 3, 20), 1e-40]
  return pair_streams.codes(n_latents=N, values=values)


@pytest.fixture(scope='module', autouse=True)
def few_offers():
  """Batches are offered in several parts."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(top_lib, '_LEAST_OFFERS', 100)
    yield


@pytest.fixture(scope='module')
def updates():
  return {name: jax.jit(of.update) for name, of in REDUCERS.items()}


def expected(name, codes):
  columns = pair_streams.best(codes, N, M, KEYS[name], name == 'top')
  return dict(
    zip((f'{name}_rows', f'{name}_values', f'{name}_documents'), columns)
  )


def check_equal(columns, others):
  assert columns.keys() == others.keys()
  for name, of in columns.items():
    np.testing.assert_array_equal(of, others[name], name)


@pytest.mark.parametrize('name', REDUCERS)
@pytest.mark.parametrize(
  'how',
  [
    {},
    {'sizes': (1, 100, 3, 256, 17)},
    {'shards': 3, 'sizes': (40,)},
    {'shuffled': True, 'shards': 2, 'sizes': (0, 77)},
    {'shuffled': True, 'make': pairs_lib.slots},
  ],
)
def test_they_are_the_best_whatever_the_way(codes, updates, name, how):
  expectation = expected(name, codes)
  how = dict(how)
  if how.pop('shuffled', False):
    rows = np.random.default_rng(1).permutation(len(codes.row_R))
    codes = codes.take(rows)
  columns = pair_streams.run(
    REDUCERS[name], codes, N, update=updates[name], **how
  )
  check_equal(columns, expectation)
  # Latent 0 never fires, latent 1 once.
  assert (columns[f'{name}_rows'][0] == -1).all()
  assert (columns[f'{name}_rows'][1] >= 0).sum() == 1
  assert columns[f'{name}_rows'].max() > 2**32


@pytest.mark.parametrize('name', REDUCERS)
def test_shards_of_latents_do_not_matter(codes, name):
  columns = pair_streams.run(REDUCERS[name], codes, N, owners=3)
  check_equal(columns, expected(name, codes))


@pytest.mark.parametrize('name', REDUCERS)
def test_more_latents_than_offers(codes, name):
  wide = pair_streams.run(REDUCERS[name], codes, 4096, sizes=(200,))
  rows = wide[f'{name}_rows']
  check_equal({k: of[:N] for k, of in wide.items()}, expected(name, codes))
  assert (rows[N:] == -1).all()


def test_merging_is_commutative_and_associative(codes, updates):
  """Integers are equal, whatever the order of the shards of the rows."""
  merge = jax.jit(TOP.merge)
  parts = [
    updates['top'](
      TOP.init(N),
      pair_streams.pairs(codes.take(rows), N, 0, pair_streams.BATCH),
    )
    for rows in np.array_split(np.arange(700), 3)
  ]
  a, b, c = parts
  whole = jax.tree.leaves(merge(merge(a, b), c))
  for other in (merge(c, merge(b, a)), merge(b, merge(c, a))):
    for x, y in zip(whole, jax.tree.leaves(other)):
      np.testing.assert_array_equal(x, y)


def test_the_order_of_a_list_is_by_key_then_row(codes):
  columns = pair_streams.run(NEAR, codes, N)
  values, rows = columns['near_values'], columns['near_rows']
  equal = values[:, :-1] == values[:, 1:]
  assert (values[:, :-1] >= values[:, 1:]).all()
  assert (rows[:, :-1] < rows[:, 1:])[equal & (rows[:, 1:] >= 0)].all()
  assert equal[2:].any()


def test_subnormal_values_are_kept(codes, updates):
  few = codes.take(slice(0, 9))
  columns = pair_streams.run(NEAR, few, N, (2, 3), update=updates['near'])
  check_equal(columns, expected('near', few))
  values = columns['near_values']
  assert ((values > 0) & (values < 1e-38)).any()


def test_no_examples_at_all(codes):
  columns = pair_streams.run(reducers.Top('top', 0), codes, N, shards=2)
  assert columns['top_rows'].shape == (N, 0)


def test_a_sample_without_a_merge_is_noticed(codes, updates):
  """A planted defect: the best of one shard of the rows alone."""
  half = codes.take(slice(0, 350))
  columns = pair_streams.run(TOP, half, N, update=updates['top'])
  with pytest.raises(AssertionError, match='top_rows'):
    check_equal(columns, expected('top', codes))


def test_documents_that_are_kept_twice_are_noticed(codes, monkeypatch):
  """A planted defect: documents differ within a batch alone."""
  insert = best.insert
  monkeypatch.setattr(
    best, 'insert', lambda *args, distinct: insert(*args, distinct=False)
  )
  columns = pair_streams.run(TOP, codes, N, sizes=(100, 100))
  with pytest.raises(AssertionError, match='top_rows'):
    check_equal(columns, expected('top', codes))


def test_ties_that_go_to_the_higher_row_are_noticed(codes, monkeypatch):
  """A planted defect in the merge of lists."""

  def is_before(a, b):
    (key, row_hi, row_lo), (other_key, other_hi, other_lo) = a, b
    is_higher = row_hi > other_hi
    is_higher |= (row_hi == other_hi) & (row_lo > other_lo)
    return (key > other_key) | ((key == other_key) & is_higher)

  monkeypatch.setattr(best, 'is_before', is_before)
  columns = pair_streams.run(NEAR, codes, N)
  with pytest.raises(AssertionError, match='near_rows'):
    check_equal(columns, expected('near', codes))


def by_default(*args, cpu, default):
  """`platform_dependent` where it is not a CPU."""
  del cpu
  return default(*args)


@pytest.mark.parametrize(
  'module, name',
  [(order, 'beaten_cpu'), (top_lib, '_has_better_neighbour')],
)
def test_only_what_is_no_best_of_its_document_is_left_out(
  codes, monkeypatch, module, name
):
  """A planted defect: neighbours of other documents count as better."""
  if module is top_lib:
    monkeypatch.setattr(jax.lax, 'platform_dependent', by_default)
  monkeypatch.setattr(module, name, lambda *of: jnp.roll(of[-1], 1) > of[-1])
  columns = pair_streams.run(TOP, codes, N)
  with pytest.raises(AssertionError, match='top_'):
    check_equal(columns, expected('top', codes))


@pytest.mark.parametrize('name', ['top', 'near'])
def test_they_are_the_best_by_the_way_of_other_chips(codes, monkeypatch, name):
  monkeypatch.setattr(jax.lax, 'platform_dependent', by_default)
  make = pairs_lib.slots if name == 'near' else pairs_lib.pairs
  columns = pair_streams.run(REDUCERS[name], codes, N, make=make)
  check_equal(columns, expected(name, codes))


@pytest.mark.parametrize('n_own', [N, 4096])
def test_pairs_are_in_order_of_latent_and_token(codes, n_own):
  few = codes.take(np.random.default_rng(2).permutation(200))
  pairs = jax.device_get(pair_streams.pairs(few, n_own, size=BATCH))
  real = pairs.latent_P < n_own
  rows = pairs.row_hi_P.astype(np.int64) << 32 | pairs.row_lo_P
  token = {row: token for token, row in enumerate(few.row_R)}
  keys = [(pairs.latent_P[p], token[rows[p]]) for p in np.flatnonzero(real)]
  assert real.sum() == few.active_RC.sum()
  assert real[: real.sum()].all()
  assert keys == sorted(keys)
  for u, latent in enumerate(pairs.latent_U):
    inside = pairs.latent_P[pairs.start_U[u] : pairs.stop_U[u]]
    assert (inside == latent).all()
    assert latent == n_own or len(inside) == (pairs.latent_P == latent).sum()
  assert (pairs.stop_U - pairs.start_U).sum() == real.sum()
  by_row = {
    (row, latent): (value, rank, document)
    for latent in range(N)
    for row, value, rank, _, document in pair_streams.of_latent(few, latent)
  }
  for p in np.flatnonzero(real):
    assert by_row[rows[p], pairs.latent_P[p]] == (
      pairs.value_P[p],
      pairs.rank_P[p],
      pairs.document_P[p],
    )
