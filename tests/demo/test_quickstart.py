"""The demo and its notebook on a small budget, with the real subject."""

import json
import pathlib
import subprocess
import sys

import pytest

from experiments import quickstart
from tests.support import notebooks

ROOT = pathlib.Path(__file__).parents[2]
BUDGET = {
  'n_tokens': 4000,
  'n_latents': 256,
  'k': 16,
  'steps': 60,
  'batch_size': 256,
  'task_prompts': 40,
  'downstream_tokens': 256,
}


def demo(workdir):
  return subprocess.run(
    [
      sys.executable,
      'experiments/quickstart.py',
      f'--workdir={workdir}',
      *(f'--{name}={value}' for name, value in BUDGET.items()),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('demo') / 'run'
  return workdir, demo(workdir)


def test_the_demo_ends_with_a_page_and_beats_its_controls(finished):
  workdir, found = finished
  assert found.returncode == 0, found.stderr
  report = json.loads((workdir / 'probe' / 'report.json').read_text())
  assert report['fvu'] < report['fvu_untrained']
  assert report['delta_ce'] < report['ce_zero'] - report['ce']
  assert 0 < report['l0'] <= BUDGET['k']
  assert len(report['probes']) == 4
  meta = json.loads((workdir / 'browser' / 'data' / 'meta.json').read_text())
  assert meta['n_features'] == BUDGET['n_latents']
  for name in ('store', 'train', 'probe', 'browser'):
    assert str(workdir / name) in found.stdout
  for word in ('NMSE', 'FVU', 'L0', 'silent', 'delta CE', 'AUC'):
    assert word in found.stdout


def test_a_second_demo_reuses_what_is_finished(finished):
  workdir, _ = finished
  before = (workdir / 'probe' / 'report.json').read_text()
  again = demo(workdir)
  assert again.returncode == 0
  for stage in ('store', 'train', 'probe', 'browser'):
    lines = [
      line for line in again.stderr.splitlines() if str(workdir / stage) in line
    ]
    assert any('is finished' in line for line in lines), stage
  assert 'harvest:' not in again.stderr
  assert (workdir / 'probe' / 'report.json').read_text() == before


def test_the_notebook_shows_what_the_demo_made(finished):
  from nbclient import NotebookClient

  workdir, _ = finished
  notebook = notebooks.read('quickstart.ipynb')
  # As a user would: the budget and the folder are in a cell of their own.
  settings = next(c for c in notebook.cells if 'QuickstartConfig(' in c.source)
  settings.source += (
    f'\nconfig = quickstart.QuickstartConfig(**{BUDGET})\n'
    f'workdir = {str(workdir)!r}'
  )
  # Its last stage is made again; `test_notebook` has all of its calls.
  page = workdir / 'browser' / 'index.html'
  before = (workdir / 'probe' / 'report.json').read_text()
  page.unlink()
  client = NotebookClient(
    notebook, timeout=600, resources={'metadata': {'path': str(ROOT)}}
  )
  client.execute()
  shown = ''.join(
    output.get('text', '')
    for cell in notebook.cells
    for output in cell.get('outputs', [])
  )
  assert 'FVU' in shown
  assert page.exists()
  assert (workdir / 'probe' / 'report.json').read_text() == before


def test_a_checkpoint_is_probed_and_read(finished, capsys):
  workdir, _ = finished
  page = workdir / 'browser' / 'index.html'
  page.unlink(missing_ok=True)
  settings = {
    'config': quickstart.QuickstartConfig(**BUDGET),
    'store': str(workdir / 'store'),
    'checkpoint': str(workdir / 'train'),
    'results': str(workdir / 'probe'),
    'page': str(workdir / 'browser'),
    'text': 'She played.',
  }
  cells = notebooks.cells('probing_a_checkpoint.ipynb')
  others = [cell for cell in cells if 'sae_jax.browse(' not in cell]
  space = notebooks.execute(others, settings)
  # Control: the stage that is left out is missed.
  assert not page.exists()
  notebooks.execute([c for c in cells if c not in others], settings, space)
  assert page.exists()
  shown = capsys.readouterr().out
  assert 'of 256 latents' in shown
  assert f'latent {space["latent"]} of 256, blocks.14.resid_post' in shown
  assert space['explanation'].tokens[0] == 'She'
  assert len(space['axes'].lines) == 2 * len(space['report']['probes'])
