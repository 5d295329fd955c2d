"""A frozen part keeps its bits on every mesh, stopped and gone on with."""

import dataclasses
import pathlib

import numpy as np
import pytest

from sae_jax import autoencoder, checkpoint, errors, mesh
from sae_jax import store as store_lib
from sae_jax.training import state as state_lib
from sae_jax.training import train
from tests.support import runs, step_runs

ARRAY = {'decoder': 'w_dec_ND', 'encoder': 'w_enc_ND'}


def frozen(config, part, **changes):
  plan = dataclasses.replace(config.optimizer, freeze=part)
  return dataclasses.replace(config, optimizer=plan, **changes)


def assert_frozen(config, shape, rows, state):
  """The frozen part's bits are the first ones; all other arrays moved."""
  made = step_runs.make_mesh(*shape)
  start = state_lib.init_state(config, made, rows[:500]).sae
  ema = state.optimizer.ema
  average = autoencoder.averaged(
    state.sae, ema.ema, ema.count, config.optimizer.ema_decay
  )
  for sae in (state.sae, average):
    for name, array in autoencoder.trained(start).items():
      got, array = np.asarray(getattr(sae, name)), np.asarray(array)
      moved = got.tobytes() != array.tobytes()
      assert moved == (name != ARRAY.get(config.optimizer.freeze)), name


@pytest.fixture(scope='module')
def rows():
  """The last batch but one has a row that is not finite."""
  rows = step_runs.ROWS.copy()
  rows[505, 3] = np.nan
  return rows


@pytest.fixture(scope='module')
def config():
  """AuxK, clipping, micro-batches and a step that is skipped take part."""
  return dataclasses.replace(
    step_runs.config(), steps=9, micro_batches=2, on_nonfinite='skip'
  )


@pytest.fixture(scope='module')
def unsharded(config, rows):
  return {
    part: step_runs.run(frozen(config, part), (1, 1), rows)
    for part in ('none', *ARRAY)
  }


def test_runs_that_are_frozen_are_others(config, rows, unsharded):
  for part, (values, _, _, state) in unsharded.items():
    assert max(row['aux'] for row in values) > 0
    assert any(row['grad_norm'] > 0.25 for row in values)
    assert values[-1]['skipped'] == 1
    # With 'none' it is the control: every array moves.
    assert_frozen(frozen(config, part), (1, 1), rows, state)
  norms = [values[0]['grad_norm'] for values, *_ in unsharded.values()]
  assert norms[0] > 1.01 * max(norms[1:])
  assert len({values[-1]['loss'] for values, *_ in unsharded.values()}) == 3


@pytest.mark.parametrize('shape', [(8, 1), (1, 8), (2, 4)])
@pytest.mark.parametrize('part', ARRAY)
def test_a_mesh_changes_nothing_but_rounding(
  config, rows, unsharded, part, shape
):
  config = frozen(config, part)
  got = step_runs.run(config, shape, rows)
  step_runs.assert_same_run(got, unsharded[part])
  assert_frozen(config, shape, rows, got[3])
  assert ARRAY[part] not in got[3].optimizer.adam.mu


@pytest.fixture(scope='module')
def alone(store, tmp_path_factory):
  """A run of each part trained by itself, by its folder's name."""
  configs = members(tmp_path_factory.mktemp('alone'))
  for workdir, config in configs.items():
    train.train(config, store, workdir)
    runs.assert_active(workdir)
  return {pathlib.Path(workdir).name: workdir for workdir in configs}


def members(folder):
  return train.sweep(
    runs.train_config(steps=15), str(folder), freeze=['none', *ARRAY]
  )


def test_runs_on_one_reading_stop_and_go_on_as_alone(store, alone, tmp_path):
  configs = members(tmp_path)
  runs.break_off(13, configs, store)
  assert {checkpoint.load(workdir).step for workdir in configs} == {10}
  train.train_many(configs, store)
  for workdir, config in configs.items():
    runs.assert_same_run(workdir, alone[pathlib.Path(workdir).name])
    data = store_lib.open_store(store)
    sample_BD = data.finite_rows(0, config.sample_rows)
    # With what was left to the run in place.
    saved = runs.saved_config(workdir)
    start = state_lib.init_state(saved, mesh.make_mesh(1, 8), sample_BD).sae
    for average in (True, False):
      sae = checkpoint.load(workdir, average=average).sae
      for part, name in ARRAY.items():
        got, first = getattr(sae, name), getattr(start, name)
        same = np.asarray(got).tobytes() == np.asarray(first).tobytes()
        assert same == (part == config.optimizer.freeze)
  # Control: they are different runs.
  assert len({runs.log(workdir) for workdir in configs}) == 3


def test_another_part_is_another_run(store, alone, tmp_path):
  for there, asked in (('decoder', 'none'), ('none', 'encoder')):
    before = runs.log(alone[f'freeze={there}'])
    with pytest.raises(
      errors.UserError, match=rf"\(freeze: '{there}' -> '{asked}'\): use anoth"
    ):
      train.train(
        frozen(runs.train_config(steps=15), asked),
        store,
        alone[f'freeze={there}'],
      )
    assert runs.log(alone[f'freeze={there}']) == before


def test_a_frozen_run_goes_on_on_another_mesh(store, alone, tmp_path):
  workdir = str(tmp_path / 'run')
  config = frozen(runs.train_config(steps=15), 'decoder')
  runs.break_off(13, {workdir: config}, store)
  other = dataclasses.replace(config, mesh_data=2, mesh_latent=4)
  sae = train.train(other, store, workdir).sae
  want = checkpoint.load(alone['freeze=decoder'], average=False).sae
  runs.assert_same_bits(sae.w_dec_ND, want.w_dec_ND)
  np.testing.assert_allclose(sae.w_enc_ND, want.w_enc_ND, rtol=1e-4, atol=1e-5)
