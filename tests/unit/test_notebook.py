"""The notebook does what the demo does; no stage of either is run here."""

import types

import IPython.display
import nbformat
import pytest

from experiments import quickstart
import sae_jax
from tests.support import documents

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


def cells():
  path = documents.ROOT / 'experiments/colab/quickstart.ipynb'
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  return [cell.source for cell in notebook.cells if cell.cell_type == 'code']


def execute(sources):
  namespace = {}
  for source in sources:
    exec(compile(source, '<cell>', 'exec'), namespace)


def test_the_notebook_calls_what_the_demo_calls(calls, monkeypatch, capsys):
  monkeypatch.chdir(documents.ROOT / 'experiments/colab')
  execute(cells())
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
  execute(source for source in cells() if 'sae_jax.train(' not in source)
  assert calls != by_notebook
