"""Training runs: they learn, save, go on, and refuse what misfits."""

import dataclasses
import shutil

import numpy as np
import pytest

from sae_jax import autoencoder, checkpoint, errors
from sae_jax import mesh as mesh_lib
from sae_jax import store as store_lib
from sae_jax.probing import baselines, reconstruction
from sae_jax.store import layout
from sae_jax.store import writer as writer_lib
from sae_jax.training import evaluation, train
from sae_jax.training import state as state_lib
from tests.support import planted, probed, runs


@pytest.fixture(scope='module')
def finished(store, tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp('runs') / 'whole')
  state = train.train(runs.train_config(), store, workdir)
  runs.assert_active(workdir)
  return workdir, state


def test_training_learns_planted_directions(store, tmp_path):
  config = planted.train_config(steps=400, log_every=50, checkpoint_every=0)
  train.train(config, store, str(tmp_path / 'run'))
  trained = checkpoint.load(str(tmp_path / 'run'))
  data = store_lib.open_store(store)
  # The rows that the loop scores: a whole batch.
  span = (data.validation_rows.start, data.validation_rows.start + 64, 64)
  found = reconstruction.measure(trained, data, *span, 'test')
  sample_BD = data.read_rows(0, 500)
  fresh = reconstruction.untrained(config.sae, sample_BD, 5)
  control = reconstruction.measure(fresh, data, *span, 'test')
  fitted_RD, scored_RD = (
    probed.inputs(trained, data.read_rows(*rows))[0]
    for rows in ((0, data.n_train), span[:2])
  )
  pca = baselines.fit_pca([fitted_RD], config.sae.k)
  pca_fvu = baselines.pca_fvu(pca, [scored_RD])[-1]
  assert found.fvu < 0.5 * min(control.fvu, pca_fvu)
  logged = runs.rows(tmp_path / 'run')[-1]
  np.testing.assert_allclose(logged['validation_fvu'], found.fvu, rtol=1e-4)


def test_log_has_every_step_once_and_no_clock(finished):
  steps = [row['step'] for row in runs.rows(finished[0]) if 'loss' in row]
  assert steps == list(range(1, 31))
  assert set(runs.rows(finished[0])[0]) == {
    'step', 'loss', 'nmse', 'aux', 'l0', 'dead_fraction', 'learning_rate',
    'grad_norm',
  }  # fmt: skip


def test_control_another_seed_gives_other_bits(finished, store, tmp_path):
  config = runs.train_config(seed=1)
  state = train.train(config, store, str(tmp_path / 'run'))
  assert (
    np.asarray(state.sae.w_enc_ND) != np.asarray(finished[1].sae.w_enc_ND)
  ).any()


def test_a_finished_run_is_left_alone(finished, store):
  before = runs.rows(finished[0])
  state = train.train(runs.train_config(), store, finished[0])
  runs.assert_same_bits(state, finished[1])
  assert runs.rows(finished[0]) == before


def test_a_workdir_with_another_config_is_refused(finished, store):
  other = runs.train_config(batch_size=128, seed=3)
  with pytest.raises(
    errors.UserError,
    match=r'batch_size: 64 -> 128; seed: 0 -> 3\): use another',
  ):
    train.train(other, store, finished[0])


def test_a_store_without_held_out_rows_is_refused_at_once(tmp_path):
  planted.write_store(str(tmp_path / 'store'), holdout_documents=0)
  with pytest.raises(
    errors.UserError,
    match='has 0 validation rows, of 0 held out; an evaluation needs',
  ):
    train.train(
      runs.train_config(), str(tmp_path / 'store'), str(tmp_path / 'run')
    )


@pytest.mark.parametrize('row', [5, 1850])
def test_a_row_that_is_not_finite_is_named_before_the_first_step(tmp_path, row):
  rows_RD = planted.activations(2090)
  rows_RD[row, 3] = np.nan
  url, workdir = str(tmp_path / 'store'), str(tmp_path / 'run')
  planted.write_store(url, rows_RD=rows_RD)
  config = runs.train_config(eval_rows=200, batch_size=20)
  with pytest.raises(errors.UserError, match=f'row {row} of store .* one of 1'):
    train.train(config, url, workdir)
  assert not (tmp_path / 'run' / 'metrics.jsonl').exists()
  # Control: no metric depends on a row that is not scored.
  data, mesh = store_lib.open_store(url), mesh_lib.make_mesh(1, 1)
  assert data.n_train == 1805
  few = runs.train_config(eval_rows=40, batch_size=20)
  evaluation.check_rows(few, data, mesh)


def test_held_out_rows_that_do_not_vary_have_no_fvu(tmp_path, caplog):
  rows_RD = planted.activations(2090)
  rows_RD[-285:] = rows_RD[-1]
  planted.write_store(str(tmp_path), rows_RD=rows_RD)
  data, mesh = store_lib.open_store(str(tmp_path)), mesh_lib.make_mesh(1, 1)
  config = runs.train_config()
  state = state_lib.init_state(config, mesh, data.read_rows(0, 500))
  sums = evaluation.make_evaluation(config, mesh, average=False)
  result = evaluation.evaluate(config, mesh, state, data, sums)
  assert np.isnan(result.fvu) and result.nmse > 0
  assert 'differ by no more than rounding' in caplog.text


def test_held_out_rows_teach_nothing_and_test_rows_are_not_seen(
  store, tmp_path
):
  """No batch and no sample at the start has them, no metric test rows."""
  clean = store_lib.open_store(store)
  whole_RD = clean.read_rows(0, clean.manifest.n_rows)
  config = runs.train_config(sample_rows=10**6)
  states = {
    'as_it_was': train.train(config, store, str(tmp_path / 'as_it_was'))
  }
  for name, rows in (
    ('validation', clean.validation_rows),
    ('test', clean.test_rows),
  ):
    rows_RD = whole_RD.copy()
    # Nobody may as much as read test rows.
    rows_RD[rows.start : rows.stop] += {'validation': 7, 'test': np.nan}[name]
    url = str(tmp_path / f'{name}_store')
    planted.write_store(url, rows_RD=rows_RD)
    states[name] = train.train(config, url, str(tmp_path / name))
    runs.assert_same_bits(states[name], states['as_it_was'])
  logs = {name: runs.log(tmp_path / name) for name in states}
  assert logs['test'] == logs['as_it_was']
  # Control: another row that is scored is seen in the metrics.
  assert logs['validation'] != logs['as_it_was']


def test_a_run_goes_on_with_the_version_of_the_data_that_it_began_with(
  tmp_path,
):
  url, whole, workdir = (str(tmp_path / n) for n in ('store', 'whole', 'run'))
  planted.write_store(url)
  want = train.train(runs.train_config(), url, whole)
  runs.break_off(15, {workdir: runs.train_config()}, url)
  # More is appended meanwhile.
  old = store_lib.open_store(url)
  plan = layout.read_plan(url)
  rows_RD = planted.activations(100, seed=9)
  made = writer_lib.StoreWriter(url, plan)
  shard = made.shard(len(old.manifest.shard_counts))
  places = np.arange(100)
  shard.append(
    places, 99 + 0 * places, places, places >= 0, {old.site: rows_RD}
  )
  shard.finish()
  made.seal(made.complete(shard.number + 1), holdout_rows=100)
  with pytest.raises(
    errors.UserError, match=r'another version: --store_version=1 '
  ):
    train.train(runs.train_config(), url, workdir)
  found = train.train(runs.train_config(store_version=1), url, workdir)
  runs.assert_same_bits(found, want)


def test_a_start_that_failed_does_not_claim_the_workdir(store, tmp_path):
  workdir = str(tmp_path / 'run')
  nothing = dataclasses.replace(runs.train_config().optimizer, adam_b1=0.25)
  config = runs.train_config(optimizer=nothing)
  runs.break_off(3, {workdir: config}, store)
  # No checkpoint was written, so nothing is lost by other settings.
  train.train(runs.train_config(), store, workdir)


@pytest.mark.parametrize('part', ['sae', 'adam', '_CHECKPOINT_METADATA'])
def test_a_damaged_checkpoint_is_named(finished, store, tmp_path, part):
  workdir = tmp_path / 'run'
  shutil.copytree(finished[0], workdir)
  folder = workdir / 'checkpoints' / '30'
  if part == '_CHECKPOINT_METADATA':
    (folder / part).write_text('{}')
  else:
    shutil.rmtree(folder / part)
  with pytest.raises(
    errors.UserError, match=r'30.* delete .*30, and .* goes on from .* step 20'
  ):
    train.train(runs.train_config(), store, str(workdir))
  # As told: without it the run goes on from step 20 to the same bits.
  shutil.rmtree(folder)
  runs.assert_same_bits(
    train.train(runs.train_config(), store, str(workdir)), finished[1]
  )


def test_a_checkpoint_under_the_name_of_another_is_refused(
  finished, store, tmp_path
):
  shutil.copytree(finished[0], tmp_path / 'run')
  steps = tmp_path / 'run/checkpoints'
  (steps / '30').rename(steps / '40')
  with pytest.raises(
    errors.UserError, match=r'40 holds the .* of step 30: give'
  ):
    train.train(runs.train_config(steps=50), store, str(tmp_path / 'run'))


def test_load_says_what_is_missing(finished, tmp_path):
  with pytest.raises(errors.UserError, match='no checkpoints under'):
    checkpoint.load(str(tmp_path))
  with pytest.raises(
    errors.UserError, match='no checkpoint of step 7: it has 20, 30'
  ):
    checkpoint.load(finished[0], step=7)


def test_load_gives_the_average_or_the_last_weights(finished):
  last = checkpoint.load(finished[0], average=False)
  runs.assert_same_bits(last.sae, finished[1].sae)
  average = checkpoint.load(finished[0])
  ema = finished[1].optimizer.ema
  decay = runs.train_config().optimizer.ema_decay
  want = autoencoder.averaged(finished[1].sae, ema.ema, ema.count, decay)
  runs.assert_same_bits(average.sae, want)
  assert (average.sae.w_enc_ND != last.sae.w_enc_ND).any()
  assert average.config == runs.saved_config(finished[0]).sae
  assert average.metadata.dataset['identity']
  assert average.mse_of_mean == float(finished[1].mse_of_mean)


def test_a_finished_run_goes_on_to_more_steps(finished, store, tmp_path):
  """As the rate does not decay, no step knows how many there are."""
  whole, longer = str(tmp_path / 'whole'), str(tmp_path / 'longer')
  shutil.copytree(finished[0], longer)
  config = runs.train_config(steps=45)
  train.train(config, store, whole)
  train.train(config, store, longer)
  runs.assert_same_bits(runs.saved_state(longer), runs.saved_state(whole))
  # The evaluation at the shorter run's end is all that the log has more.
  more = [row for row in runs.rows(longer) if row not in runs.rows(whole)]
  assert [row['step'] for row in more] == [30]
  assert 'validation_nmse' in more[0]


def test_a_finished_run_with_decay_keeps_its_steps(store, tmp_path):
  falling = dataclasses.replace(runs.train_config().optimizer, decay_steps=5)
  workdir = str(tmp_path / 'run')
  train.train(runs.train_config(steps=10, optimizer=falling), store, workdir)
  before = runs.log(workdir)
  with pytest.raises(errors.UserError, match='steps: 10 -> 20'):
    train.train(runs.train_config(steps=20, optimizer=falling), store, workdir)
  assert runs.log(workdir) == before


def test_a_workdir_may_be_relative(store, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = runs.train_config(steps=2)
  train.train(config, store, 'run')
  assert train.train(config, store, 'run').step == 2
  assert checkpoint.load('run').step == 2
  assert runs.saved_steps(tmp_path / 'run') == [2]
