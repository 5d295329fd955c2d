"""Trainers are compared on the same rows, by a metric that is as defined."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from experiments.peers import compare, files, grid, metric, ours, table
from experiments.peers import rows as rows_lib
import sae_jax
from sae_jax import errors
from sae_jax.autoencoder import initial
from sae_jax.feed import from_store
from sae_jax.store import open_store


@pytest.fixture(name='arrays')
def arrays_fixture():
  rng = np.random.default_rng(0)
  # The last latent is never among the largest.
  b_enc_N = np.append(rng.standard_normal(10), -100)
  return metric.Arrays(
    rng.standard_normal((11, 5)), b_enc_N, rng.standard_normal((11, 5)),
    rng.standard_normal(5), 3,
  )  # fmt: skip


def by_definition(arrays, rows):
  """Error, spread, active latents and who fired, row by row."""
  error = spread = active = 0.0
  fired = set()
  for x_D in rows:
    pre_N = [
      sum((x_D - arrays.b_dec_D) * w_D) + b
      for w_D, b in zip(arrays.w_enc_ND, arrays.b_enc_N)
    ]
    output_D = arrays.b_dec_D.copy()
    for i in sorted(range(len(pre_N)), key=pre_N.__getitem__)[-arrays.k :]:
      if pre_N[i] > 0:
        output_D += pre_N[i] * arrays.w_dec_ND[i]
        active += 1
        fired.add(i)
    error += sum((x_D - output_D) ** 2)
    spread += sum((x_D - rows.mean(0)) ** 2)
  return error / spread, active / len(rows), 1 - len(fired) / len(pre_N)


def test_the_metric_is_its_definition(arrays, monkeypatch):
  rows = np.random.default_rng(1).standard_normal((40, 5))
  # Several blocks, the last one short.
  monkeypatch.setattr(metric, '_BLOCK_ELEMENTS', 11 * 7)
  blocks = metric.blocks(rows, 11)
  found = metric.score(blocks, functools.partial(metric.forward, arrays))
  expected = by_definition(arrays, rows)
  np.testing.assert_allclose(
    [found[name] for name in ('fvu', 'l0', 'silent')], expected, rtol=1e-12
  )
  assert 0 < found['silent'] < 1
  # Another autoencoder, by less than would be seen: it is not what was scored.
  for change in ({'k': 4}, {'b_dec_D': arrays.b_dec_D + 1e-3}):
    other = dataclasses.replace(arrays, **change)
    passes = functools.partial(metric.forward, other)
    assert abs(metric.score(blocks, passes)['fvu'] - expected[0]) > 1e-6


def test_silent_is_of_the_rows_that_are_looked_at(arrays):
  rows = np.random.default_rng(1).standard_normal((40, 5))
  passes = functools.partial(metric.forward, arrays)
  for numbers in (np.array([3, 4]), np.arange(0, 40, 2)):
    share = metric.silent_share(metric.blocks(rows, 11, numbers), passes)
    assert math.isclose(share, by_definition(arrays, rows[numbers])[2])


def test_rows_that_rounding_could_change_are_not_compared():
  arrays = metric.Arrays(np.eye(3), np.zeros(3), np.eye(3), np.zeros(3), 1)
  rows = np.array([[1, 0.5, 0], [1, 1 - 1e-7, 0], [-1, -1, -1]])
  theirs = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]])
  assert metric.check(arrays, rows, theirs, 0.5) == 0
  for wrong in ([1, 0, 1e-4], [np.nan, 0, 0]):
    with pytest.raises(ValueError, match='differ by'):
      metric.check(arrays, rows, np.array([wrong, *theirs[1:]]), 0.5)
  # The roundings of one that diverged are as large as it is.
  wrong = np.array([[1, 0, 1e-4], *theirs[1:]])
  assert metric.check(arrays, rows, wrong, 1e3) == 1e-4
  with pytest.raises(ValueError, match='of 0 rows of 2'):
    metric.check(arrays, rows[[1, 1]], theirs[[1, 1]], 0.5)


@pytest.fixture(name='unit_rows', scope='module')
def unit_rows_fixture(store, tmp_path_factory):
  """The folder of a planted store's rows."""
  workdir = str(tmp_path_factory.mktemp('rows'))
  config = rows_lib.RowsConfig(n_tokens=5000, batch_size=64)
  rows_lib.write(config, store, workdir)
  return workdir


def test_splits_share_no_document(store, unit_rows):
  data = open_store(store)
  documents = data.documents()[data.stream_index()]
  splits = rows_lib.split_rows(data)
  of_split = [set(documents[list(rows)]) for rows in splits.values()]
  assert all(of_split) and len(set.union(*of_split)) == sum(map(len, of_split))
  # Moved by a row, two splits do.
  first = splits['test'].start
  assert documents[first] != documents[first - 1] == documents[first - 2]
  rows_RD = data.read_rows(0, data.manifest.n_rows)
  for split, numbers in splits.items():
    x_RD = files.rows(unit_rows, split)
    assert len(x_RD) == len(numbers) == files.counts(unit_rows)[split]
    np.testing.assert_allclose(x_RD.mean(-1), 0, atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(x_RD, axis=-1), 1, rtol=1e-6)
    raw_RD = rows_RD[numbers.start : numbers.stop]
    raw_RD = raw_RD - raw_RD.mean(-1, keepdims=True)
    cosine_R = (x_RD * raw_RD).sum(-1) / np.linalg.norm(raw_RD, axis=-1)
    np.testing.assert_allclose(cosine_R, 1, rtol=1e-6)


def test_a_single_held_out_document_cannot_be_split(tmp_path):
  from tests.support import planted

  url = str(tmp_path / 'store')
  planted.write_store(url, n_rows=300, holdout_documents=1)
  with pytest.raises(errors.UserError, match='a larger holdout_fraction'):
    rows_lib.split_rows(open_store(url))


def test_the_order_in_the_files_is_that_of_the_feed(unit_rows):
  data = open_store(unit_rows + '/store')
  train = files.rows(unit_rows, 'train')
  for seed in (0, 1):
    cell = grid.Cell('sae_jax', 32, 4, 5000, 64, 1e-3, seed, '')
    config = ours.run_config(cell, {})
    order = from_store.train_order(
      data, config.order_seed, config.window_chunks, config.lanes
    )
    feed = from_store.StoreFeed(data, order, config.batch_size)
    numbers = files.order(unit_rows, seed, config.steps * config.batch_size)
    # More steps than an epoch has.
    assert len(numbers) > 2 * len(train)
    for step in (0, 7, config.steps - 1):
      of_step = numbers[64 * step : 64 * (step + 1)]
      np.testing.assert_array_equal(feed.batch(step), train[of_step])
  assert (numbers != files.order(unit_rows, 0, len(numbers))).any()
  with pytest.raises(ValueError, match='places, a run needs 99999'):
    files.order(unit_rows, 0, 99_999)


def test_rows_are_those_of_one_store(unit_rows, tmp_path):
  from tests.support import planted

  before = files.digest(unit_rows)
  other = str(tmp_path / 'store')
  planted.write_store(
    other, n_rows=1900, rows_RD=planted.activations(1900, seed=1)
  )
  with pytest.raises(errors.UserError, match='has rows of another store'):
    rows_lib.write(rows_lib.RowsConfig(n_tokens=100), other, unit_rows)
  assert files.digest(unit_rows) == before


@pytest.mark.parametrize(
  'preprocessing', ['none', 'center_unit_norm', 'dataset']
)
def test_exported_arrays_reconstruct_as_the_autoencoder(
  preprocessing, unit_rows, monkeypatch
):
  config = sae_jax.SaeConfig(
    d_model=16, n_latents=32, k=4, preprocessing=preprocessing
  )
  sae = initial.init_weights(config, jax.random.key(0))
  sample_BD = np.array(files.rows(unit_rows, 'train')[:256])
  rng = np.random.default_rng(0)
  sae = sae.replace(
    b_lat_N=np.float32(0.1 * rng.standard_normal(32)),
    b_pre_D=np.float32(0.1 * rng.standard_normal(16)),
    data_mean_D=sample_BD.mean(0),
    data_scale=np.float32(0.7),
  )
  trained = sae_jax.Trained(config, sae, 1.0, 20)
  cell = grid.Cell('sae_jax', 32, 4, 1280, 64, 1e-3, 0, '')
  found = ours.scores(cell, trained, unit_rows)
  assert found['forward_error'] < 1e-5
  x_RD = np.array(files.rows(unit_rows, 'test'))
  error = ((x_RD - np.array(trained.reconstruct(x_RD))) ** 2).sum()
  fvu = error / ((x_RD - x_RD.mean(0)) ** 2).sum()
  np.testing.assert_allclose(found['test_fvu'], fvu, rtol=1e-4)
  # A bias that is not in the units of the rows is noticed.
  wrong = dataclasses.replace(
    ours.export(trained, sample_BD), b_dec_D=1.001 * np.array(sae.b_pre_D)
  )
  monkeypatch.setattr(ours, 'export', lambda *_: wrong)
  with pytest.raises(ValueError, match='differ by '):
    ours.scores(cell, trained, unit_rows)


def test_settings_replace_fields_and_name_the_cells(unit_rows):
  config = ours.OursConfig(settings=('ema_decay=0.5', 'on_nonfinite=stop'))
  cell = grid.Cell('sae_jax', 64, 4, 6400, 64, 1e-3, 1, 'rows')
  run = ours.run_config(cell, ours.parsed(config.settings))
  assert (run.optimizer.ema_decay, run.on_nonfinite) == (0.5, 'stop')
  assert (run.steps, run.optimizer.warmup_steps, run.seed) == (100, 5, 1)
  assert run.optimizer.decay_steps == 95
  shape = (64, 4, 6400)
  of_shape = ours.group(config, shape, unit_rows).settings
  for change in ({'settings': ()}, {'label': 'again'}):
    other = dataclasses.replace(config, **change)
    assert ours.group(other, shape, unit_rows).settings != of_shape
  # Nothing of the weights changes.
  config = dataclasses.replace(config, settings=('ema_decay=0.5',))
  assert ours.group(config, shape, unit_rows).settings == of_shape
  with pytest.raises(errors.UserError, match="no field 'ema'"):
    ours.parsed(('ema=0.5',))
  with pytest.raises(errors.UserError, match="ema_decay 'x' is not of"):
    ours.parsed(('ema_decay=x',))


def cells_of(group, seeds, fvu):
  """What `grid.wanted` asks for, one call after another, as it is run."""
  results, asked = {}, []
  while cells := grid.wanted(group, (1.0, 2.0, 4.0), seeds, results):
    asked.append(sorted({cell.rate for cell in cells}))
    for cell in cells:
      results[cell] = {'validation_fvu': fvu(cell.rate)}
  return asked, results


@pytest.mark.parametrize(
  ('fvu', 'beyond'),
  [
    (lambda rate: abs(math.log2(rate / 2)), []),
    (lambda rate: abs(math.log2(rate / 16)), [8, 16, 32]),
    (lambda rate: abs(math.log2(rate * 2)), [0.5, 0.25]),
    # Rates that diverge are the worst.
    (lambda rate: 1 / rate if rate < 8 else None, [8]),
  ],
)
def test_rates_are_extended_until_the_best_is_not_at_an_edge(fvu, beyond):
  group = grid.Cell('peer', 64, 4, 6400, 64, 0.0, 0, 'rows')
  asked, results = cells_of(group, (0, 1), fvu)
  assert asked == [[1, 2, 4], *([rate] for rate in beyond)]
  assert len(results) == 2 * (3 + len(beyond))


def test_lines_of_cells_are_read_back(tmp_path):
  group = grid.Cell('peer', 64, 4, 6400, 64, 0.0, 0, 'rows')
  _, results = cells_of(group, (0,), lambda rate: abs(rate - 2))
  for number, (cell, result) in enumerate(results.items()):
    grid.append(str(tmp_path / f'{number % 2}.jsonl'), cell, result)
  assert grid.read(str(tmp_path)) == results
  assert not grid.wanted(group, (1.0, 2.0, 4.0), (0,), results)


def test_the_table_says_where_a_peer_wins():
  def results_of(trainer, fvus):
    group = grid.Cell(trainer, 64, 4, 6400, 64, 0.0, 0, 'rows')
    records = {}
    for rate, of_seeds in fvus.items():
      for seed, fvu in enumerate(of_seeds):
        cell = dataclasses.replace(group, rate=rate, seed=seed)
        records[cell] = {
          # The rate is not chosen on test rows.
          'validation_fvu': abs(rate - 2), 'test_fvu': fvu, 'test_l0': 4.0,
          'test_silent': 0.2, 'train_silent': 0.1, 'version': '1',
          'device': 'cpu',
        }  # fmt: skip
    return table.at_best_rate(group, (0, 1), records)

  own = results_of('sae_jax', {1.0: (0.1, 0.1), 2.0: (0.3, 0.32), 4.0: (1, 1)})
  assert (own['rate'], own['at_edge']) == (2.0, False)
  np.testing.assert_allclose((own['fvu'], own['spread']), (0.31, 0.02))
  near = results_of('near', {1.0: (1, 1), 2.0: (0.325, 0.32), 4.0: (1, 1)})
  far = results_of('far', {2.0: (0.5, 0.51), 4.0: (1, 1)})
  better = results_of('better', {1.0: (1, 1), 2.0: (0.2, 0.21), 4.0: (1, 1)})
  assert far['at_edge']
  for peers, clear, wins, words in (
    (
      {'far': far},
      True,
      [],
      'is below far, the best peer, by 0.1950, ',
    ),
    ({'far': far, 'near': near}, False, [], 'no more than the spread'),
    ({'far': far, 'better': better}, False, ['better'], 'better reconstruct'),
  ):
    found = table.verdict(own, peers)
    assert (found['clear'], found['wins']) == (clear, wins)
    shape = {'n': 64, 'k': 4, 'tokens': 6400, 'batch': 64, 'seeds': 2}
    shape |= {'trainers': {'sae_jax': own, **peers}, 'verdict': found}
    shown = '\n'.join(table.lines(shape, 'sae_jax'))
    assert words in shown
    assert ('an end of its grid' in shown) == ('far' in peers)


def test_a_peer_must_be_known():
  with pytest.raises(errors.UserError, match='sparse is not a peer'):
    compare.PeersConfig(peers=('sparse',))
