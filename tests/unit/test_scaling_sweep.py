"""The sweep of a real model: its runs, what is kept of them, and its table."""

import dataclasses
import json
import pathlib

import pytest

from experiments.scaling import sweep
from sae_jax import errors
from sae_jax import store as store_lib
from sae_jax.scaling import table
from sae_jax.sweeps import work
from sae_jax.training.config import TrainConfig


@pytest.fixture
def config(store, tmp_path, monkeypatch):
  monkeypatch.setattr(sweep, 'KS', (4,))
  monkeypatch.setattr(sweep, 'K', 4)
  monkeypatch.setattr(sweep, 'SEEDED', (16,))
  monkeypatch.setattr(sweep, '_WIDEST_CONVERGED', 16)
  return sweep.SweepConfig(
    parts=('grid', 'seeds'),
    widths=('16', '32'),
    sites=(store_lib.open_store(store).site,),
    tokens=TrainConfig().batch_size,
    cells=str(tmp_path / 'cells.jsonl'),
    table=str(tmp_path / 'cells.csv'),
  )


def test_runs_are_kept_and_trained_once(config, store, tmp_path, monkeypatch):
  result = sweep.measure(config, store, str(tmp_path / 'runs'))
  assert result == {'kept': 3, 'left': 0}
  text = pathlib.Path(config.cells).read_text()
  assert str(tmp_path) not in text and 'config' not in json.loads(
    text.splitlines()[0]
  )
  rows = table.read(config.table)
  assert sorted((row.n_latents, row.seed) for row in rows) == [
    (16, 0),
    (16, 1),
    (32, 0),
  ]
  # Elsewhere, with the lines alone, nothing is trained and nothing is lost.
  monkeypatch.setattr(work, 'work', lambda options, cells, workdir: len(cells))
  elsewhere = str(tmp_path / 'elsewhere')
  assert sweep.measure(config, store, elsewhere) == result
  assert pathlib.Path(config.cells).read_text() == text
  # Other tokens are other runs.
  longer = dataclasses.replace(config, tokens=2 * config.tokens)
  assert sweep.measure(longer, store, elsewhere) == {'kept': 3, 'left': 3}


def test_parts_have_the_runs_that_laws_need(config, store):
  def cells(*parts):
    return sweep.cells(dataclasses.replace(config, parts=parts), store)

  assert {cell.config.steps for cell in cells('grid')} == {1}
  (converged,) = cells('converged')
  assert converged.converge and not converged.config.optimizer.decay_steps
  few = dataclasses.replace(config, widths=('32',))
  assert [cell.config.sae.n_latents for cell in sweep.cells(few, store)] == [32]
  with pytest.raises(errors.UserError, match='widths 32,x are no numbers'):
    sweep.cells(dataclasses.replace(config, widths=('32', 'x')), store)
  with pytest.raises(errors.UserError, match='no part is called grids: use'):
    cells('grids')
