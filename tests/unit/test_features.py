"""The feature table against slow loops over tokens and dense codes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as scipy_stats

from sae_jax import errors
from sae_jax.probing import examples, lens, neighbours
from sae_jax.probing import table as table_lib
from tests.support import probed, tables

CONFIG = examples.FeatureConfig(
  feature_rows=1000,
  top_examples=5,
  random_examples=3,
  window_before=4,
  window_after=2,
  votes=6,
  neighbours=4,
)
N, W = 24, 7


def build(trained, data, folder, config=CONFIG, batch_rows=50, seed=0):
  """All columns of a table, as it is read back."""
  opened = tables.build(trained, data, str(folder), config, batch_rows, seed)
  return {name: opened.column(name) for name in opened.columns}


@pytest.fixture(scope='module')
def table(trained, data, tmp_path_factory):
  return build(trained, data, tmp_path_factory.mktemp('made'))


@pytest.fixture(scope='module')
def dense_RN(trained, data):
  x_RD, _ = probed.inputs(trained, data.read_rows(0, data.manifest.n_rows))
  return probed.latents(trained, x_RD)


def row_document(data):
  return data.documents()[data.stream_index()]


def slow_window(data, acts_R, row, before, after, start=0, stop=None):
  """Tokens and activations around a row, walking out from it."""
  stop = data.manifest.n_rows if stop is None else stop
  row_at = {place: r for r, place in enumerate(data.stream_index().tolist())}
  centre = int(data.stream_index()[row])
  tokens, acts = np.full(before + 1 + after, -1), np.zeros(before + 1 + after)
  for step, reach in ((-1, before), (1, after)):
    for away in range(reach + 1):
      place = centre + step * away
      tokens[before + step * away] = data.tokens()[place]
      here = row_at.get(place)
      acts[before + step * away] = 0 if here is None else acts_R[here]
      # On to the next token, if it is of this context and was encoded.
      beyond = place + step
      first = place if step < 0 else beyond
      if first == len(data.positions()) or data.positions()[first] == 0:
        break
      if beyond in row_at and not start <= row_at[beyond] < stop:
        break
  return tokens, acts


def test_statistics_equal_the_dense_codes(table, dense_RN):
  fired_RN = dense_RN > 0
  np.testing.assert_array_equal(table['latent_ids'], np.arange(N))
  np.testing.assert_array_equal(table['count'], fired_RN.sum(0))
  np.testing.assert_allclose(table['density'], fired_RN.mean(0), rtol=1e-6)
  np.testing.assert_array_equal(table['hist_counts'].sum(1), fired_RN.sum(0))
  assert table['hist_counts'][:, [0, -1]].any(0).all()
  for latent in range(N):
    values = dense_RN[fired_RN[:, latent], latent]
    if len(values) < 2:
      continue
    for name, value in (
      ('max', values.max()),
      ('mean', values.mean()),
      ('std', values.std()),
      ('skew', scipy_stats.skew(values)),
    ):
      np.testing.assert_allclose(table[name][latent], value, rtol=2e-3)
    # Float32 codes may fall on the other side of an edge, one bin over.
    counts = np.histogram(values, table['hist_edges'])[0]
    moved = np.abs(np.cumsum(counts) - table['hist_counts'][latent].cumsum())
    assert moved.max() <= 1
  assert table['count'][list(probed.DEAD)].sum() == 0


def test_top_examples_are_each_documents_best(table, data, dense_RN):
  documents = row_document(data)
  several = 0
  for latent in range(N):
    best = {}
    for row in np.flatnonzero(dense_RN[:, latent]):
      best_row = best.get(documents[row])
      if best_row is None or dense_RN[row, latent] > dense_RN[best_row, latent]:
        best[documents[row]] = row
    rows = sorted(best.values(), key=lambda r: -dense_RN[r, latent])[:5]
    peaks = table['top_peak'][latent]
    assert peaks.tolist() == [4] * len(rows) + [-1] * (5 - len(rows))
    several += len(rows) > 1
    for example, row in enumerate(rows):
      tokens, acts = slow_window(data, dense_RN[:, latent], row, 4, 2)
      assert table['top_document'][latent, example] == documents[row]
      np.testing.assert_array_equal(
        table['top_tokens'][latent, example], tokens
      )
      np.testing.assert_allclose(
        table['top_acts'][latent, example], acts, rtol=1e-3, atol=1e-4
      )
    assert (table['top_tokens'][latent, len(rows) :] == -1).all()
    assert not table['top_acts'][latent, len(rows) :].any()
    assert (table['top_document'][latent, len(rows) :] == -1).all()
  assert several > 10
  # Control: without documents, the best five are others.
  best_NM = -np.sort(-dense_RN.T, axis=1)[:, :5]
  assert np.abs(table['top_acts'][:, :, 4] - best_NM).max() > 0.01


def test_random_examples_are_positive_and_any(
  table, trained, data, dense_RN, tmp_path
):
  count = (dense_RN > 0).sum(0)
  present = table['random_peak'] >= 0
  np.testing.assert_array_equal(present.sum(1), np.minimum(count, 3))
  assert (table['random_acts'][present][:, 4] > 0).all()
  assert (table['random_tokens'][~present] == -1).all()
  other = build(trained, data, tmp_path, seed=1)
  assert (other['random_tokens'] != table['random_tokens']).any()
  np.testing.assert_array_equal(other['top_tokens'], table['top_tokens'])
  # Unlike the best, they are of no particular size.
  value = np.sort(dense_RN, axis=0)
  middle_N = [np.median(v[v > 0]) if (v > 0).any() else 0 for v in value.T]
  high = table['random_acts'][:, :, 4] > np.array(middle_N)[:, None]
  assert 0.25 < high[present].mean() < 0.75
  assert (table['top_acts'][:, 0, 4] >= middle_N - np.float64(1e-4)).all()


def test_the_batch_does_not_matter(table, trained, data, tmp_path):
  other = build(trained, data, tmp_path, batch_rows=7)
  assert other.keys() == table.keys()
  for name, array in table.items():
    np.testing.assert_allclose(other[name], array, rtol=1e-3, atol=1e-5)


def test_votes_and_neighbours_are_the_decoders(table, trained):
  w_dec_ND = np.asarray(trained.sae.w_dec_ND)
  want = lens.votes(probed.make_subject(), probed.SITE, w_dec_ND, 6)
  for name, array in zip(('up_ids', 'up_logits', 'down_ids'), want):
    np.testing.assert_array_equal(table[f'vote_{name}'], array)
  ids, cosines = neighbours.nearest(w_dec_ND, 4)
  np.testing.assert_array_equal(table['neighbour_ids'], ids)
  np.testing.assert_array_equal(table['neighbour_cosines'], cosines)


def test_fewer_rows_are_read_on_request(trained, data, dense_RN, tmp_path):
  config = dataclasses.replace(CONFIG, feature_rows=61, votes=1000)
  table = build(trained, data, tmp_path, config)
  np.testing.assert_array_equal(table['count'], (dense_RN[:61] > 0).sum(0))
  np.testing.assert_allclose(
    table['density'], (dense_RN[:61] > 0).mean(0), rtol=1e-6
  )
  # There are no more votes than tokens.
  assert table['vote_up_ids'].shape == (N, probed.VOCABULARY)


def test_an_autoencoder_that_never_fires_has_a_table(trained, data, tmp_path):
  silent = dataclasses.replace(
    trained, sae=trained.sae.replace(b_lat_N=jnp.full(N, -1e3))
  )
  table = build(silent, data, tmp_path)
  for name in ('count', 'density', 'max', 'mean', 'std', 'skew', 'hist_counts'):
    assert not table[name].any()
  assert (table['top_peak'] == -1).all() and (table['random_peak'] == -1).all()


def test_processes_with_the_same_latents_take_turns():
  blocks = [(0, 64), (64, 128), (128, 192), (192, 200)]
  held = {
    0: [(0, 50), (50, 100), (100, 150)],
    1: [(0, 50), (50, 100), (100, 150)],
    2: [(100, 150), (150, 200)],
    3: [(0, 200)],
  }
  own = [table_lib._own_blocks(blocks, held, process) for process in range(4)]
  # Processes 0, 1 and 3 have the first two blocks, 2 and 3 the others.
  assert own == [[(0, 64)], [(64, 128)], [(128, 192)], [(192, 200)]]
  del held[3]
  with pytest.raises(
    errors.UserError,
    match=r'latents 0 to 199 are a shard .* none of 3 processes has them all',
  ):
    table_lib._own_blocks([(0, 200)], held, 0)
