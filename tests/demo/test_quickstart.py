"""The demo and its notebook on a small budget, with the real subject."""

import json
import pathlib
import subprocess
import sys

import nbformat
import pytest

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
# Enough to walk the path.
SMALLER = {
  'n_tokens': 1500,
  'steps': 20,
  'task_prompts': 16,
  'downstream_tokens': 64,
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


def test_the_binaries_walk_the_same_path(tmp_path):
  text = tmp_path / 'texts.jsonl'
  text.write_text(
    ''.join(
      json.dumps({'text': f'In chapter {i} the {word} was left at sea. ' * 4})
      + '\n'
      for i, word in enumerate(('ship', 'captain', 'whale', 'harpoon') * 8)
    )
  )
  place = {n: f'{tmp_path}/{n}' for n in ('store', 'train', 'probe', 'page')}
  commands = {
    'harvest': {'store': place['store'], 'sources': text, 'n_tokens': 900},
    'train': {
      'store': place['store'], 'workdir': place['train'], 'n_latents': 64,
      'k': 8, 'batch_size': 64, 'steps': 30,
    },
    'probe': {
      'store': place['store'], 'checkpoint': place['train'],
      'workdir': place['probe'], 'n_tasks': 1, 'task_prompts': 16,
      'downstream_tokens': 64,
    },
    'browse': {'probe': place['probe'], 'workdir': place['page']},
  }  # fmt: skip
  said = {}
  for name, flags in commands.items():
    found = subprocess.run(
      [
        pathlib.Path(sys.executable).parent / f'sae-{name}',
        *(f'--{flag}={value}' for flag, value in flags.items()),
      ],
      capture_output=True,
      text=True,
    )
    assert found.returncode == 0, found.stderr
    said[name] = found.stdout
  manifest = json.loads((tmp_path / 'store' / 'manifest.json').read_text())
  assert f'{manifest["n_rows"]} rows of width 576' in said['harvest']
  report = json.loads((tmp_path / 'probe' / 'report.json').read_text())
  assert f'NMSE {report["nmse"]:.4f}' in said['probe']
  assert f'{place["page"]}/index.html' in said['browse']
  columns = json.loads(
    (tmp_path / 'page' / 'data' / 'columns.json').read_text()
  )
  assert len(columns['latent']) == 64


def test_the_notebook_runs_on_a_small_budget(tmp_path):
  from nbclient import NotebookClient

  path = ROOT / 'experiments' / 'colab' / 'quickstart.ipynb'
  notebook = nbformat.read(path, as_version=4)
  # As a user would: the budget and the folder are the first code cell.
  settings = next(c for c in notebook.cells if 'QuickstartConfig(' in c.source)
  settings.source = (
    f'config = quickstart.QuickstartConfig(**{BUDGET | SMALLER})\n'
    f'workdir = {str(tmp_path / "colab")!r}'
  )
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
  assert (tmp_path / 'colab' / 'browser' / 'index.html').exists()


def test_the_notebook_is_kept_small():
  path = ROOT / 'experiments' / 'colab' / 'quickstart.ipynb'
  assert path.stat().st_size < 200_000


def test_lost_results_are_made_again(finished):
  workdir, _ = finished
  for name in ('probe/features.npz', 'browser/data/columns.json'):
    (workdir / name).unlink()
  again = demo(workdir)
  assert again.returncode == 0, again.stderr
  for name in ('probe/features.npz', 'browser/data/columns.json'):
    assert (workdir / name).exists(), name
