"""The second pass over codes, against one latent and one row at a time."""

import inspect
import itertools
import os

import numpy as np
import pytest

from sae_jax import errors
from sae_jax import store as store_lib
from sae_jax.probing import examples
from sae_jax.probing.examples import (
  deciles,
  excerpts,
  partners,
  second,
  spills,
  tallies,
)
from tests.support import second_pass_reference as reference
from tests.support import small

N, K, SEED = 24, 5, 3
DTYPES = {
  'tokens': np.int32,
  'acts': np.float32,
  'peak': np.int32,
  'document': np.int32,
  'ids': np.int32,
  'counts': np.int64,
  'shares': np.float32,
  'scores': np.float32,
}


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  """Contexts of 16 of a few tokens, some 110 rows, a quarter masked."""
  url = str(tmp_path_factory.mktemp('second') / 'store')
  data = small.data()
  data['tokens'] %= 7
  small.write(url, data)
  return store_lib.open_store(url)


def config(**kwargs):
  sizes = {
    'window_before': 4,
    'window_after': 2,
    'decile_examples': 2,
    'firing_tokens': 3,
    'partners': 4,
  }
  return examples.FeatureConfig(**(sizes | kwargs))


def rows_of(codes):
  """Rows of examples of a block: some none, the first and the last."""
  rng = np.random.default_rng(1)
  all_rows = {}
  for kind, size in (('top', 3), ('near', 2)):
    rows = rng.integers(codes.start, codes.start + codes.n_rows, (N, size))
    rows[rng.random(rows.shape) < 0.2] = -1
    rows[5] = codes.start
    rows[N - 1, 0] = codes.start + codes.n_rows - 1
    all_rows[kind] = rows
  return lambda first, stop: {
    kind: rows[first:stop] for kind, rows in all_rows.items()
  }


def run(config, codes, store, blocks, scratch):
  """The columns of the blocks, each after the other."""
  parts, firsts = [], []
  for first, columns in examples.second_pass(
    config, codes, store, blocks, rows_of(codes), SEED, scratch
  ):
    parts.append(columns)
    firsts.append(first)
  assert firsts == [first for first, _ in blocks]
  return {
    name: np.concatenate([part[name] for part in parts]) for name in parts[0]
  }


def check(config, codes, store, scratch):
  """Raises AssertionError unless every column is the reference's."""
  got = run(config, codes, store, [(0, N)], scratch)
  want = reference.columns(
    config, codes, store, 0, N, rows_of(codes)(0, N), SEED
  )
  assert got.keys() == want.keys()
  for name, array in want.items():
    assert got[name].dtype == DTYPES[name.rpartition('_')[2]], name
    assert got[name].shape == array.shape, name
    np.testing.assert_allclose(
      got[name],
      array,
      rtol=1e-6 if name in ('token_shares', 'partner_scores') else 0,
      err_msg=name,
    )
  return want


@pytest.fixture(params=['in memory', 'in pieces'])
def pieces(request, monkeypatch):
  """Whether latents and rows are taken in small pieces."""
  if request.param == 'in pieces':
    monkeypatch.setattr(spills, 'ENTRIES', 40)
    monkeypatch.setattr(tallies, 'CHUNK', 9)
    monkeypatch.setattr(excerpts, '_EXAMPLES', 4)


@pytest.mark.parametrize('span', [(0, None), (0, 61), (29, 74)])
@pytest.mark.parametrize('before,after', [(0, 0), (4, 2), (20, 15)])
def test_columns_equal_a_slow_loop(
  store, tmp_path, pieces, span, before, after
):
  start, stop = span[0], span[1] or store.manifest.n_rows
  codes = reference.codes(start, stop - start, K, N)
  want = check(
    config(window_before=before, window_after=after), codes, store, tmp_path
  )
  # The case holds what could go wrong.
  count_N = [len(reference.activations(codes)[latent]) for latent in range(N)]
  assert count_N[0] == 0 and max(count_N[2:-1]) > 10 and min(count_N[2:]) < 10
  assert count_N[-1] == codes.n_rows
  assert {2, 3} == {*want['partner_ids'][2:4, 0]}
  assert (want['partner_ids'][-1] == -1).all()
  assert 0 < (want['decile_peak'] >= 0).mean() < 1
  assert (want['token_counts'][2:] > 0).any(1).all()


def test_rows_that_have_no_active_latent(store, tmp_path, pieces):
  codes = reference.codes(0, 50, K, N)
  vals_RK, _ = codes.read(0, 50)
  vals_RK[7:40] = 0
  vals_RK[41] = -1
  check(config(), codes, store, tmp_path)
  vals_RK[:] = 0
  check(config(), codes, store, tmp_path)
  none = reference.Codes(9, vals_RK[:0], np.zeros((0, K), np.int32))
  ((_, columns),) = examples.second_pass(
    config(),
    none,
    store,
    [(0, N)],
    lambda first, stop: {'top': np.full((stop - first, 3), -1)},
    SEED,
    tmp_path,
  )
  assert (columns['top_tokens'] == -1).all()
  assert (columns['partner_ids'] == -1).all()


def test_columns_do_not_depend_on_how_the_work_is_divided(
  store, tmp_path, monkeypatch
):
  codes = reference.codes(3, 90, K, N)
  want = run(config(), codes, store, [(0, N)], tmp_path)
  for entries, chunk, cuts in ((7, 10, (0, 1, 8, N)), (200, 50, (0, 23, N))):
    monkeypatch.setattr(spills, 'ENTRIES', entries)
    monkeypatch.setattr(tallies, 'CHUNK', chunk)
    blocks = list(itertools.pairwise(cuts))
    got = run(config(), codes, store, blocks, tmp_path)
    for name, array in want.items():
      np.testing.assert_array_equal(got[name], array, err_msg=name)
    # Of a process that makes some of them, in any order.
    for first, stop in reversed(blocks):
      alone = run(config(), codes, store, [(first, stop)], tmp_path)
      for name, array in want.items():
        np.testing.assert_array_equal(alone[name], array[first:stop])
  # Control: another seed draws other examples.
  monkeypatch.setattr(f'{__name__}.SEED', SEED + 1)
  other = run(config(), codes, store, [(0, N)], tmp_path)
  assert (other['decile_tokens'] != want['decile_tokens']).any()
  assert (other['top_tokens'] == want['top_tokens']).all()


def edited(module, name, good, bad):
  """A function of a module with another line."""
  source = inspect.getsource(getattr(module, name))
  assert source.count(good) == 1, f'{name} has no such line any more: {good}'
  code = {}
  exec(source.replace(good, bad), vars(module), code)
  return code[name]


@pytest.mark.parametrize(
  'module,name,good,bad',
  [
    (excerpts, 'write', 'centre - before', 'centre - before + 1'),
    (excerpts, 'write', 'ends_L[centre]', 'ends_L[centre] - 1'),
    (excerpts, 'write', 'begins_L[centre]', '0'),
    (deciles, '_bounds', 'wanted_TN = -(-', 'wanted_TN = -(1 - '),
    (deciles, '_tenths', 'place >= equal', 'place > equal'),
    (partners, 'strongest', '(other_C != latent_C + latents.start)', 'True'),
    (spills, '_text', "'tokens': tokens_L", "'tokens': np.roll(tokens_L, 1)"),
    (spills, '_text', 'place + 1', '0'),
    (spills, 'write', 'start - before), min', 'start), min'),
    (spills, 'read', '>= spill.start - spill.first', '>= 0'),
    (second, '_windows', 'low:high]', 'low : high - 1]'),
  ],
  ids=lambda value: value if isinstance(value, str) else '',
)
def test_control_a_defect_is_seen(
  store, tmp_path, monkeypatch, module, name, good, bad
):
  monkeypatch.setattr(spills, 'ENTRIES', 40)
  codes = reference.codes(29, 60, K, N)
  check(config(), codes, store, tmp_path / 'right')
  monkeypatch.setattr(module, name, edited(module, name, good, bad))
  with pytest.raises(AssertionError):
    check(config(), codes, store, tmp_path / 'wrong')


def test_values_of_near_misses_are_handed_on(store, tmp_path):
  codes = reference.codes(0, 40, K, N)
  values = np.ones((N, 2), np.float32)
  near = np.full((N, 2), -1)
  ((_, columns),) = examples.second_pass(
    config(),
    codes,
    store,
    [(0, N)],
    lambda first, stop: {'near': near, 'near_values': values},
    SEED,
    tmp_path,
  )
  assert columns['near_values'] is values
  assert 'near_values_tokens' not in columns


def test_files_are_removed(store, tmp_path):
  codes = reference.codes(0, 40, K, N)
  other = tmp_path / 'other'
  other.write_text('kept')
  left = tmp_path / 'second_pass' / '0.pairs'
  left.parent.mkdir()
  left.write_bytes(b'of a pass that was killed')
  passes = examples.second_pass(
    config(), codes, store, [(0, 9), (9, N)], rows_of(codes), SEED, tmp_path
  )
  next(passes)
  assert not left.exists() and any(left.parent.iterdir())
  passes.close()
  assert os.listdir(tmp_path) == ['other']


def test_a_process_without_latents_writes_nothing(store, tmp_path):
  codes = reference.codes(0, 40, K, N)
  columns = examples.second_pass(
    config(), codes, store, [], rows_of(codes), SEED, tmp_path
  )
  assert list(columns) == [] == os.listdir(tmp_path)


def test_examples_of_rows_without_codes(store, tmp_path):
  codes = reference.codes(5, 40, K, N)
  for row in (4, 45):
    with pytest.raises(ValueError, match=f'examples of rows {row} to {row}'):
      list(
        examples.second_pass(
          config(),
          codes,
          store,
          [(0, 1)],
          lambda first, stop, row=row: {'top': np.array([[row]])},
          SEED,
          tmp_path,
        )
      )
  assert not os.listdir(tmp_path)


def test_a_folder_that_can_not_be_written(store, tmp_path):
  (tmp_path / 'file').write_text('')
  codes = reference.codes(0, 40, K, N)
  with pytest.raises(errors.UserError, match='cannot write the sorted codes'):
    run(config(), codes, store, [(0, N)], tmp_path / 'file')
