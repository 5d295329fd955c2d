"""The loop: many runs from one reading, what is not finite, what it tells."""

import dataclasses
import json
import logging
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import checkpoint, errors, mesh
from sae_jax import store as store_lib
from sae_jax.autoencoder import metrics
from sae_jax.feed import from_store
from sae_jax.training import loop, train
from sae_jax.training import run as run_lib
from sae_jax.training import saver as saver_lib
from sae_jax.training.state import init_state
from tests.support import planted, runs


@pytest.fixture(scope='module')
def spoilt(tmp_path_factory):
  url = str(tmp_path_factory.mktemp('spoilt') / 'store')
  runs.write_spoilt_store(url)
  return url


def test_a_sweep_is_every_combination_by_name(tmp_path):
  base = planted.train_config()
  found = train.sweep(base, str(tmp_path), k=[2, 4], seed=[0, 1])
  assert {
    pathlib.Path(workdir).name: (config.sae.k, config.seed)
    for workdir, config in found.items()
  } == {
    'k=2_seed=0': (2, 0),
    'k=2_seed=1': (2, 1),
    'k=4_seed=0': (4, 0),
    'k=4_seed=1': (4, 1),
  }
  assert {str(pathlib.Path(workdir).parent) for workdir in found} == {
    str(tmp_path)
  }
  assert train.sweep(base, 'run') == {'run': base}
  with pytest.raises(
    errors.UserError, match='no field colour to sweep: use some of'
  ):
    train.sweep(base, 'run', colour=['red'])


def test_members_may_be_of_different_lengths(store, tmp_path):
  """Between the end of one and where the other goes on none is trained."""
  workdirs = [str(tmp_path / name) for name in ('short', 'long', 'whole')]
  short, long = planted.train_config(steps=5), planted.train_config(steps=15)
  train.train(long, store, workdirs[2])
  runs.break_off(13, {workdirs[1]: long}, store)
  assert runs.saved_steps(workdirs[1]) == [10]
  train.train_many({workdirs[0]: short, workdirs[1]: long}, store)
  assert [runs.saved_steps(w)[-1] for w in workdirs] == [5, 15, 15]
  runs.assert_same_run(workdirs[1], workdirs[2])


@pytest.mark.parametrize(
  ('field', 'values'),
  [
    ('batch_size', [64, 128]),
    ('order_seed', [0, 1]),
    ('window_chunks', [4, 5]),
  ],
)
def test_runs_on_other_batches_are_refused(store, tmp_path, field, values):
  configs = train.sweep(
    planted.train_config(), str(tmp_path / 'runs'), **{field: values}
  )
  with pytest.raises(
    errors.UserError,
    match=rf'{field} differs between runs .*\({values[0]}, {values[1]}\)',
  ):
    train.train_many(configs, store)
  assert not (tmp_path / 'runs').exists()


def all_finite(tree):
  return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  ('checkpoint_every', 'said'),
  [
    (3, 'the checkpoint of step {} is good'),
    (0, 'there is no checkpoint yet'),
  ],
)
def test_a_step_that_is_not_finite_stops_the_run(
  spoilt, tmp_path, checkpoint_every, said
):
  config = planted.train_config(
    sample_rows=50, checkpoint_every=checkpoint_every
  )
  step = runs.spoilt_step(config, store_lib.open_store(spoilt))
  good = (step - 1) // 3 * 3
  assert good > 0
  workdir = str(tmp_path / 'run')
  with pytest.raises(FloatingPointError) as caught:
    train.train(config, spoilt, workdir)
  for part in (
    f'at step {step} of {workdir} (batch {step - 1} of order_seed 0: ',
    f'store row {runs.SPOILT_ROW} is not finite, one of 1 such rows)',
    f': {said.format(good)}; lower the learning rate',
    '--on_nonfinite=skip',
  ):
    assert part in str(caught.value)
  steps = [row['step'] for row in runs.rows(workdir)]
  assert steps == list(range(1, step))
  assert runs.saved_steps(workdir)[-1:] == ([good] if checkpoint_every else [])
  if checkpoint_every:
    state = runs.saved_state(workdir)
    assert int(state.step) == good
    assert all_finite(state.sae) and all_finite(state.optimizer)


def test_a_stop_says_when_the_rows_are_not_to_blame(store, tmp_path):
  wild = dataclasses.replace(
    planted.train_config().optimizer, learning_rate=1e30
  )
  with pytest.raises(
    FloatingPointError, match=r'its 64 store rows, \d+ to \d+, are finite\)'
  ):
    train.train(
      planted.train_config(optimizer=wild), store, str(tmp_path / 'run')
    )


def test_steps_that_are_not_finite_are_skipped_and_told(
  spoilt, tmp_path, caplog
):
  config = planted.train_config(
    sample_rows=50, steps=60, on_nonfinite='skip', checkpoint_every=0
  )
  data = store_lib.open_store(spoilt)
  order = from_store.train_order(data, 0, config.window_chunks)
  places = order.lane().rows_at(0, 60 * config.batch_size)
  steps = np.flatnonzero(places == runs.SPOILT_ROW) // config.batch_size + 1
  assert len(steps) > 1
  workdir = str(tmp_path / 'run')
  with caplog.at_level(logging.WARNING, logger='absl'):
    state = train.train(config, spoilt, workdir)
  told = [text for text in caplog.messages if text.endswith(': skipped')]
  assert len(told) == len(steps)
  for text, step in zip(told, steps):
    assert f'at step {step} of {workdir} ' in text
    assert f'store row {runs.SPOILT_ROW} is not finite' in text
  found = [row for row in runs.rows(workdir) if 'loss' in row]
  assert [row['skipped'] for row in found] == [
    int((steps <= step).sum()) for step in range(1, 61)
  ]
  assert [row['step'] for row in found if row['loss'] is None] == steps.tolist()
  assert all_finite(state.sae) and all_finite(state.optimizer)
  assert int(state.skipped) == len(steps)


@pytest.fixture
def fresh(store, tmp_path):
  """A run that has done no step, and the devices it lies on."""
  config = planted.train_config(eval_every=1, checkpoint_every=1)
  data, devices = (
    store_lib.open_store(store),
    mesh.make_mesh(1, jax.device_count()),
  )
  state = init_state(config, devices, data.read_rows(0, 500))
  workdir = str(tmp_path / 'run')
  with saver_lib.Saver(workdir) as saver:
    order = from_store.train_order(data, 0)
    batches = from_store.StoreFeed(data, order, 64, devices)
    run = run_lib.Run(config, workdir, devices, state, data, batches, saver)
    yield run, devices
    run.close()


class _Batches:
  """Batches that take a while, and read a megabyte each."""

  def __init__(self, wait, seconds=0.0):
    self.bytes_read, self._wait, self._seconds = 0, wait, seconds

  def iterate(self, start, stop):
    for step in range(start, stop):
      self._wait(0.5 if step == start else self._seconds)
      self.bytes_read += 10**6
      yield step


@pytest.mark.parametrize(('making', 'step'), [(0.06, 0.02), (0.01, 0.07)])
def test_the_clock_tells_what_waiting_there_was(monkeypatch, making, step):
  """Of 21 steps, of which the first, that reads and compiles, is left out."""
  now = [100.0]

  def wait(seconds):
    now[0] += seconds

  monkeypatch.setattr(
    loop, 'time', types.SimpleNamespace(monotonic=lambda: now[0])
  )
  batches = _Batches(wait, making)
  clock = loop.Clock(batches)
  assert clock.metrics() == {}
  for number in clock.timed(batches.iterate(0, 21)):
    wait(0.5 if not number else step)
  feed_metrics = clock.metrics()
  share = making / (making + step)
  np.testing.assert_allclose(feed_metrics['feed_wait_share'], share)
  np.testing.assert_allclose(
    feed_metrics['feed_bytes_per_s'], 1e6 / (making + step)
  )


def test_nothing_is_told_of_batches_that_are_not_read():
  batches = _Batches(lambda seconds: None)
  clock = loop.Clock(batches)
  list(clock.timed(batches.iterate(0, 2)))
  batches.bytes_read = None
  assert clock.metrics() == {}


def test_a_batch_that_is_not_on_the_devices_is_refused(fresh, store):
  run, devices = fresh
  batch_BD = store_lib.open_store(store).read_rows(0, 64)
  with pytest.raises(jax.errors.JaxRuntimeError, match='Disallowed host-to-'):
    run.advance(batch_BD)
  assert run.done == 0
  run.advance(jax.device_put(batch_BD, mesh.sharding(devices, 'BD')))
  # Evaluating and saving read from the devices, outside of the guard.
  run.due()
  assert runs.rows(run.workdir)[-1]['validation_tokens'] == 64
  run.close()
  with (
    pytest.raises(jax.errors.JaxRuntimeError),
    jax.transfer_guard('disallow'),
  ):
    jnp.sum(batch_BD)


def test_a_profile_changes_no_metric_and_is_not_taken_twice(store, tmp_path):
  plain, profiled = str(tmp_path / 'plain'), tmp_path / 'profiled'
  train.train(planted.train_config(steps=16), store, plain)
  config = planted.train_config(steps=16, profile_start=3, profile_steps=2)
  runs.break_off(13, {str(profiled): config}, store)
  traces = list((profiled / 'profile').rglob('*.xplane.pb'))
  assert len(traces) == 1 and traces[0].stat().st_size > 0
  (profiled / 'profile').rename(tmp_path / 'elsewhere')
  train.train(config, store, str(profiled))
  assert not (profiled / 'profile').exists()
  runs.assert_same_run(str(profiled), plain)
  assert not pathlib.Path(plain, 'profile').exists()


def test_a_profile_ends_with_the_run(store, tmp_path):
  config = planted.train_config(steps=5, profile_start=4, profile_steps=100)
  train.train(config, store, str(tmp_path / 'run'))
  assert list((tmp_path / 'run' / 'profile').rglob('*.xplane.pb'))
  # Only one trace can be open.
  with jax.profiler.trace(str(tmp_path / 'next')):
    pass


@pytest.mark.parametrize('average', [True, False])
def test_evaluations_are_of_the_averaged_and_of_the_last_weights(
  store, tmp_path, average
):
  workdir = str(tmp_path / 'run')
  train.train(planted.train_config(eval_every=10), store, workdir)
  found = [row for row in runs.rows(workdir) if 'validation_nmse' in row]
  assert [row['step'] for row in found] == [10, 20, 30]
  data = store_lib.open_store(store)
  prefix, other = 'validation', 'validation_last'
  if not average:
    prefix, other = other, prefix
  # Batches of 64 are whole ones: the rest of the validation rows is left.
  assert 64 < len(data.validation_rows) < 128
  first = data.validation_rows.start
  rows_RD = data.read_rows(first, first + 64)
  for row in found[1:]:
    trained = checkpoint.load(workdir, average=average, step=row['step'])
    sums = metrics.evaluate_batch(trained.config, trained.sae, rows_RD)
    want = metrics.summarise(
      metrics.add_sums(None, sums), trained.mse_of_mean
    ).scalars()
    for name, value in want.items():
      np.testing.assert_allclose(row[f'{prefix}_{name}'], value, rtol=1e-5)
    # Control: the other weights score otherwise.
    assert not math.isclose(row[f'{other}_nmse'], want['nmse'], rel_tol=1e-4)
    live = sum(row['validation_log10_density'])
    dead = row['validation_dead_fraction'] * trained.config.n_latents
    assert live + dead == trained.config.n_latents and live > 0


def test_the_config_lies_in_the_workdir(store, tmp_path):
  config = planted.train_config(steps=2)
  train.train(config, store, str(tmp_path))
  found = json.loads((tmp_path / 'config.json').read_text())
  # Whole, with what was left to the run in place.
  assert found == dataclasses.asdict(runs.saved_config(tmp_path))
  assert found['optimizer']['adam_b1'] == 0.7
  assert found['steps'] == config.steps
