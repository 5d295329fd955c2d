"""The notebooks: their parts, and the two that take little time."""

import base64
import sys
import types

import IPython.display
import pytest

from experiments import quickstart
from experiments.colab import setup
import sae_jax
from sae_jax.scaling import table
from tests.support import documents, notebooks, planted, scaling_cells

STAGES = ('harvest', 'train', 'probe', 'browse')


@pytest.fixture
def calls(monkeypatch):
  """The stages that are called, with their arguments; none does anything."""
  calls = []
  manifest = types.SimpleNamespace(n_rows=9, holdout_rows=1, mask={})
  for name in STAGES:
    monkeypatch.setattr(
      sae_jax,
      name,
      lambda *args, name=name: calls.append((name, *args)) or manifest,
    )
  monkeypatch.setattr(sae_jax, 'report_lines', lambda report: ['a report'])
  monkeypatch.setattr(IPython.display, 'Image', str)
  return calls


def test_the_notebook_calls_what_the_demo_calls(calls, capsys):
  cells = notebooks.cells('quickstart.ipynb')
  notebooks.execute(cells, {'workdir': 'runs/colab'})
  by_notebook = calls.copy()
  assert [name for name, *_ in by_notebook] == list(STAGES)
  assert '9 rows, 1 held out' in capsys.readouterr().out
  calls.clear()
  config = quickstart.QuickstartConfig()
  workdir = documents.ROOT / 'runs/colab'
  quickstart.quickstart(config, str(workdir))
  assert calls == by_notebook
  # Controls: another budget, and a stage that is left out.
  calls.clear()
  quickstart.quickstart(quickstart.QuickstartConfig(steps=9), str(workdir))
  assert calls != by_notebook
  calls.clear()
  left = [cell for cell in cells if 'sae_jax.train(' not in cell]
  notebooks.execute(left, {'workdir': 'runs/colab'})
  assert calls != by_notebook


def test_a_grid_is_trained_and_its_laws_are_fitted(
  store, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(
    sae_jax, 'harvest', lambda _, url: sae_jax.open_store(url).manifest
  )
  tables = tmp_path / 'tables'
  tables.mkdir()
  larger = scaling_cells.table(
    scaling_cells.COEFFICIENTS['paper'], range(8, 12), (8, 16, 32)
  )
  table.write(larger, tables / 'larger.csv')
  settings = {
    'store': store,
    'workdir': str(tmp_path / 'sweep'),
    'fits': str(tmp_path / 'fits'),
    'training': planted.train_config(
      steps=8, batch_size=64, checkpoint_every=8, log_every=8
    ),
    'axes': {'n_latents': (16, 24, 32, 48), 'k': (2, 4)},
    'fitting': sae_jax.FitConfig(draws=20),
    'tables': str(tables),
  }
  cells = notebooks.cells('scaling_laws.ipynb')
  # Control: where no run was trained there is nothing to fit.
  left = [cell for cell in cells if 'run_sweep(' not in cell]
  with pytest.raises(sae_jax.UserError, match='sweep'):
    notebooks.execute(left, settings)
  capsys.readouterr()
  space = notebooks.execute(cells, settings)
  shown = capsys.readouterr().out
  assert '8 of 8 runs are done' in shown
  assert 'larger.csv' in shown
  assert len(space['places']) == 1
  for name in ('fits/report.html', 'fits/surface.png', 'fits_larger/fits.json'):
    assert (tmp_path / name).exists(), name


@pytest.mark.parametrize('name', notebooks.NAMES)
def test_a_notebook_opens_with_its_picture_and_has_no_other_output(name):
  notebook = notebooks.read(name)
  first, *others = [c for c in notebook.cells if c.cell_type == 'code']
  assert notebook.cells[:2] == [notebook.cells[0], first]
  assert not any(cell.outputs for cell in others)
  (output,) = first.outputs
  png = base64.b64decode(output.data['image/png'])
  shows = first.source.splitlines()[-1]
  assert png == eval(shows, {'setup': setup}).data
  assert (notebooks.FOLDER / name).stat().st_size < 150_000
  # Control: the picture of another.
  of = {'feature.png', 'scaling.png', 'k_sparse.png', 'reconstruction.png'}
  (own,) = [image for image in of if f"'{image}'" in shows]
  assert all(png != setup.picture(image).data for image in of - {own})


THERE = {'jax': '0.7.2', 'jaxlib': '0.7.2', 'libtpu': '0.0.21.1'}


def test_colab_keeps_the_jax_that_is_there(monkeypatch, capsys):
  found = THERE | {'numpy': '2.1.3', 'jax-cuda12-plugin': '0.7.2', 'flax': '9'}
  monkeypatch.setattr(
    setup.metadata,
    'distributions',
    lambda: [
      types.SimpleNamespace(metadata={'Name': name}, version=version)
      for name, version in found.items()
    ],
  )
  commands = []

  def run(command, **_):
    commands.append(command)
    if '--constraint' in command:
      path = command[command.index('--constraint') + 1]
      with open(path) as file:
        commands.append(file.read().split())
    return types.SimpleNamespace(returncode=0)

  monkeypatch.setattr(setup.subprocess, 'run', run)
  setup.install()
  assert not commands
  monkeypatch.setitem(sys.modules, 'google.colab', types.ModuleType('colab'))
  setup.install()
  with_constraints, kept, data = commands
  wanted = {f'{n}=={v}' for n, v in found.items() if n != 'flax'}
  assert len(kept) == len(wanted) and set(kept) == wanted
  assert with_constraints[:4] == [sys.executable, '-m', 'pip', 'install']
  assert with_constraints[-1] == str(documents.ROOT)
  assert '--no-deps' in data and 'sae-probes==0.4.2' in data
  assert 'jax==0.7.2' in capsys.readouterr().out
  # pip's own last words, where it fails.
  monkeypatch.setattr(
    setup.subprocess,
    'run',
    lambda *_, **__: types.SimpleNamespace(returncode=1, stderr='a\nno room'),
  )
  with pytest.raises(sae_jax.UserError, match='pip cannot install: no room'):
    setup.install()


def test_a_jax_that_is_too_old_is_refused():
  assert setup.constraints(THERE)
  with pytest.raises(sae_jax.UserError, match=r'0\.5\.3 that is here is older'):
    setup.constraints(THERE | {'jax': '0.5.3'})
