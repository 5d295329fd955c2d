"""Sweeps: the grid, packs, workers that share it, what is recorded."""

import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import threading

import pytest

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.storage import leases as leases_lib
from sae_jax.sweeps import cells as cells_lib
from sae_jax.sweeps import convergence, cost, packs
from sae_jax.sweeps import work as work_lib
from sae_jax.sweeps.cells import read_cells
from sae_jax.sweeps.grid import grid
from sae_jax.sweeps.work import work, WorkConfig
from sae_jax.training import defaults, train
from sae_jax.training.config import TrainConfig
from tests.support import planted, runs

# Of two programs.
AXES = {'k': (2, 4), 'tokens': (640, 1000), 'seed': (0, 1)}


def base(**fields):
  values = config_lib.flat(planted.train_config())
  return config_lib.from_flat(
    TrainConfig, values | {'learning_rate': 0.0} | fields
  )


def test_a_grid_is_every_combination_of_fields_and_tokens(store):
  cells = grid(base(), [store], AXES)
  assert len(cells) == len({cell.name for cell in cells}) == 8
  sizes = {(c.config.sae.k, c.config.steps, c.config.seed) for c in cells}
  # Batches of 64: of 1,000 tokens the last step takes a whole one.
  assert sizes == {
    (k, steps, seed) for k in (2, 4) for steps in (10, 16) for seed in (0, 1)
  }
  assert cells[0].name.startswith('k=2_tokens=640_seed=0-')
  # All that is left to a run is in place, so that its name says all.
  assert all(cell.config.optimizer.learning_rate > 0 for cell in cells)
  assert {cell.rate_factor for cell in cells} == {1.0}


def test_a_factor_is_of_the_rate_that_the_rule_has(store):
  one, twice = grid(base(), [store], {'rate_factor': (1.0, 2.0)})
  rule = defaults.learning_rate(base())
  assert one.config.optimizer.learning_rate == rule
  assert twice.config.optimizer.learning_rate == 2 * rule
  (given,) = grid(base(learning_rate=0.01), [store], {})
  assert math.isnan(given.rate_factor)


def test_more_active_latents_than_latents_are_left_out(store):
  cells = grid(base(), [store], {'n_latents': (4, 16), 'k': (2, 8)})
  sizes = [(c.config.sae.n_latents, c.config.sae.k) for c in cells]
  assert sizes == [(4, 2), (16, 2), (16, 8)]
  with pytest.raises(errors.UserError, match='more active latents k than'):
    grid(base(), [store], {'n_latents': (4,), 'k': (8,)})


@pytest.mark.parametrize(
  ('axes', 'message'),
  [
    ({'colour': ('red',)}, 'no field colour to sweep'),
    ({'k': (2, 2)}, r'k has a value twice \(2, 2\)'),
    ({'steps': (5,), 'tokens': (640,)}, 'steps follow from tokens'),
    ({'mesh_latent': (1, 2)}, 'one mesh: give --mesh_latent one value'),
    ({'learning_rate': (1.0,), 'rate_factor': (1.0,)}, 'from rate_factor'),
  ],
)
def test_axes_that_are_none_are_refused(store, axes, message):
  with pytest.raises(errors.UserError, match=message):
    grid(base(), [store], axes)


def test_a_name_tells_all_that_a_run_depends_on(store):
  def name(**fields):
    return grid(base(**fields), [store], {})[0].name

  assert name() == name(checkpoint_every=7, eval_rows=99)
  others = {'seed': 1}, {'order_seed': 1}, {'steps': 7}, {'pre_bias': 'output'}
  assert len({name(), *(name(**other) for other in others)}) == 5


def test_a_name_from_before_a_setting_was_there_is_the_same(store):
  (cell,) = grid(base(), [store], {})
  left_out = {
    name
    for role in ('may_change', 'later')
    for name in config_lib.names_with(TrainConfig, role)
  }
  assert {'pre_bias', 'target_site'} <= left_out
  values = config_lib.flat(cell.config)
  content = {n: v for n, v in values.items() if n not in left_out}
  content |= {
    'identity': cell.identity,
    'site of the data': 'blocks.0.resid_post',
    'converge': 0.0,
  }
  text = json.dumps(content, sort_keys=True, default=str)
  assert hashlib.sha256(text.encode()).hexdigest().startswith(cell.name)


def test_packs_share_a_reading_and_fit(store):
  cells = grid(base(), [store], AXES | {'order_seed': (0, 1)})
  whole = packs.packs(cells, None, 1)
  assert [len(pack) for pack in whole] == [8, 8]
  assert all(len({c.config.order_seed for c in pack}) == 1 for pack in whole)
  few = packs.packs(cells, None, 1, most=3)
  assert sorted(len(pack) for pack in few) == [2, 2, 3, 3, 3, 3]
  # A pack ends where the memory does; a run alone is never left out.
  largest = max(packs.memory.state_bytes(c.config) for c in cells)
  for room in (0, 4 * largest, 8 * largest):
    by_memory = packs.packs(cells, room, 1)
    assert sorted(c.name for pack in by_memory for c in pack) == sorted(
      c.name for c in cells
    )
    for pack in by_memory:
      sizes = [packs.memory.state_bytes(c.config) for c in pack]
      assert len(pack) == 1 or sum(sizes) + max(sizes) / 4 <= 0.75 * room
  # Those that last longest come first.
  assert few[0][0].config.steps == 16


def test_operations_are_counted_by_hand():
  config = base(n_latents=32, k=4, steps=10)
  config = dataclasses.replace(
    config, sae=dataclasses.replace(config.sae, d_model=16)
  )
  tokens = 10 * config.batch_size
  assert cost.spent(config) == tokens * (2 * 32 * 16 + 4 * 4 * 2 * 16)
  assert cost.dense_equivalent(config) == tokens * 3 * 2 * 32 * 16


@pytest.fixture(scope='module')
def swept(store, tmp_path_factory):
  """A finished sweep of one worker."""
  workdir = str(tmp_path_factory.mktemp('swept'))
  cells = grid(base(), [store], AXES)
  assert work(WorkConfig(), cells, workdir) == 0
  return workdir, cells


def test_a_cell_is_the_run_that_training_makes(swept, store, tmp_path):
  workdir, cells = swept
  cell = cells[3]
  train.train(cell.config, store, str(tmp_path / 'alone'))
  runs.assert_same_run(
    cells_lib.run_url(workdir, cell), str(tmp_path / 'alone')
  )
  record = next(r for r in read_cells(workdir) if r['name'] == cell.name)
  last = runs.rows(tmp_path / 'alone')[-1]
  for name in ('nmse', 'fvu', 'l0'):
    assert record['scores']['validation'][name] == last[f'validation_{name}']
  # Other rows, other figures.
  test, validation = (record['scores'][r] for r in ('test', 'validation'))
  assert test['fvu'] != validation['fvu'] and math.isfinite(test['fvu'])
  assert record['tokens'] == cell.config.steps * 64 and not record['failure']


def test_no_run_is_done_twice(swept, store, monkeypatch):
  workdir, cells = swept
  records = read_cells(workdir)
  assert len(records) == 8

  def train_many(*args):
    raise AssertionError('nothing is left to train')

  monkeypatch.setattr(train, 'train_many', train_many)
  assert work(WorkConfig(), cells, workdir) == 0
  assert read_cells(workdir) == records
  assert not list(pathlib.Path(workdir, 'claims').iterdir())


def test_two_workers_do_each_run_once(tmp_path, monkeypatch, swept):
  cells, done = swept[1], []
  both = threading.Barrier(2)

  def do(config, own, workdir, mesh):
    # At first both are at work.
    if not done:
      both.wait(60)
    done.extend(cell.name for cell in own)
    for cell in own:
      path = pathlib.Path(workdir, 'cells', f'{cell.name}.json')
      path.parent.mkdir(exist_ok=True)
      path.write_text('{}')
    return True

  monkeypatch.setattr(work_lib, '_do', do)
  config, left = WorkConfig(runs_at_a_time=2, claim_minutes=0.1), []
  threads = [
    threading.Thread(
      target=lambda: left.append(work(config, cells, str(tmp_path)))
    )
    for _ in range(2)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert left == [0, 0]
  assert sorted(done) == sorted(cell.name for cell in cells)
  assert not list((tmp_path / 'claims').iterdir())


def scores(workdir):
  return {r['name']: r['scores'] for r in read_cells(str(workdir))}


def test_the_runs_of_a_worker_that_is_gone_are_gone_on_with(
  store, tmp_path, swept
):
  cells = swept[1][:2]
  runs.break_off(
    7, {cells_lib.run_url(tmp_path, c): c.config for c in cells}, store
  )
  clock = [0.0]
  gone = leases_lib.Leases(f'{tmp_path}/claims', 'gone', 600, lambda: clock[0])
  assert all(gone.take(cell.name) for cell in cells)
  assert work(WorkConfig(wait=False), cells, str(tmp_path)) == 0
  want = scores(swept[0])
  assert scores(tmp_path) == {c.name: want[c.name] for c in cells}


def test_runs_that_others_have_are_left_to_them(store, tmp_path, swept):
  cells = swept[1][:2]
  other = leases_lib.Leases(f'{tmp_path}/claims', 'other', 600)
  assert other.take(cells[0].name)
  assert work(WorkConfig(wait=False), cells, str(tmp_path)) == 1
  assert [r['name'] for r in read_cells(str(tmp_path))] == [cells[1].name]


def test_a_run_that_fails_is_recorded_and_the_others_go_on(tmp_path, store):
  cells = grid(base(), [store], {'rate_factor': (1.0, 1e30)})
  assert work(WorkConfig(keep_runs=False), cells, str(tmp_path)) == 0
  records = {r['rate_factor']: r for r in read_cells(str(tmp_path))}
  assert 'at step' in records[1e30]['failure']
  assert not records[1e30]['scores'] and records[1.0]['scores']
  assert not list((tmp_path / 'runs').iterdir())


@pytest.fixture(scope='module')
def converged(store, tmp_path_factory):
  """A run that ends when its loss falls by less than a share."""
  workdir = str(tmp_path_factory.mktemp('converged'))
  config = base(steps=400, learning_rate=0.02)
  (cell,) = grid(config, [store], {}, 0.05)
  assert work(WorkConfig(), [cell], workdir) == 0
  return workdir, cell


def test_a_run_ends_where_its_loss_falls_no_more(converged, store, tmp_path):
  workdir, cell = converged
  (stopped,) = read_cells(workdir)
  looks = convergence.looks(cell.config)
  assert looks[-3:] == [200, 283, 400] and stopped['steps'] in looks[1:-1]
  losses = {
    row['step']: row[convergence.LOSS]
    for row in runs.rows(cells_lib.run_url(workdir, cell))
    if convergence.LOSS in row
  }
  # It was looked at there and nowhere else, and fell by more before.
  assert list(losses) == [step for step in looks if step <= stopped['steps']]
  falls = [1 - b / a for a, b in itertools.pairwise(losses.values())]
  assert falls[-1] < 0.05 and all(fall >= 0.05 for fall in falls[:-1])
  # It is the run that training makes of so many steps.
  config = dataclasses.replace(cell.config, steps=stopped['steps'])
  train.train(config, store, str(tmp_path / 'alone'))
  alone = runs.rows(tmp_path / 'alone')[-1]
  assert stopped['scores']['validation']['fvu'] == alone['validation_fvu']
  assert stopped['tokens'] == stopped['steps'] * 64


def test_convergence_is_told_from_two_looks_at_the_log(tmp_path):
  config = base(steps=400)
  looks = convergence.looks(config)
  losses = [1.0, 0.94, 0.89, 0.85]
  lines = [
    {'step': step, convergence.LOSS: loss} for step, loss in zip(looks, losses)
  ]
  log = tmp_path / 'metrics.jsonl'
  log.write_text('\n'.join(map(json.dumps, [{'step': 1}, *lines])))

  def ends(nth, share=0.05):
    return convergence.ends(config, share, str(tmp_path), nth)

  # It fell by 6, 5.3 and 4.5 %.
  assert [ends(nth) for nth in range(4)] == [False, False, False, True]
  assert not any(ends(nth, 0.01) for nth in range(4))
  # With or without a log the last look ends a run, and so do all its steps.
  assert ends(len(looks) - 1) and ends(0, 0.0)
  with pytest.raises(errors.UserError, match='lacks validation_fvu of step'):
    ends(4)


def test_a_run_that_converges_is_gone_on_with(converged, store, tmp_path):
  workdir, cell = converged
  steps = read_cells(workdir)[0]['steps']
  url = cells_lib.run_url(tmp_path, cell)
  for look in convergence.looks(cell.config):
    if look < steps:
      train.train(dataclasses.replace(cell.config, steps=look), store, url)
  runs.break_off(steps - 3, {url: cell.config}, store)
  assert work(WorkConfig(), [cell], str(tmp_path)) == 0
  assert scores(tmp_path) == scores(workdir)


def test_a_run_is_not_looked_at_while_its_rate_warms_up(store):
  # Left to it, the rate of a run warms up beyond a 32nd of its steps.
  (cell,) = grid(base(steps=400, warmup_steps=-1), [store], {}, 0.01)
  assert cell.config.optimizer.warmup_steps == 20
  looks = convergence.looks(cell.config)
  assert looks == [25, 36, 50, 71, 100, 142, 200, 283, 400]
  for nth in range(len(looks)):
    convergence.part(cell.config, 0.01, nth)
  # A control: a run of fewer steps than it warms up for is refused.
  with pytest.raises(errors.UserError, match='exceed the 18 steps'):
    dataclasses.replace(cell.config, steps=18)


def test_a_rate_that_falls_and_convergence_do_not_fit(store):
  with pytest.raises(errors.UserError, match='use --decay_steps=0'):
    grid(base(decay_steps=5), [store], {}, 0.01)


def test_a_folder_without_runs_is_named(tmp_path):
  with pytest.raises(errors.UserError, match='has no finished run'):
    read_cells(str(tmp_path))


def test_a_rate_that_the_rule_extrapolates_to_is_told(store, caplog):
  with caplog.at_level('WARNING', logger='absl'):
    grid(base(steps=10), [store], {'n_latents': (16,)})
    assert 'extrapolated to n_latents 16' in caplog.text
    caplog.clear()
    grid(base(steps=10), [store], {'n_latents': (16,), 'rate_factor': (2.0,)})
    assert not caplog.text
