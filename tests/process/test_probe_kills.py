"""A sae-probe that is killed, and goes on, ends with the same bytes.

`SAE_JAX_PROBE_KILLS=20` kills it so often, and prints what it was doing.
"""

import collections
import os
import pathlib
import random
import shutil
import signal
import sys
import time

import pytest

from tests.support import binaries, runs

KILLS = int(os.environ.get('SAE_JAX_PROBE_KILLS', '1'))
STAGES = ('scan', 'table', 'any')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """The folder of a store and of a run of a few steps."""
  root = tmp_path_factory.mktemp('made')
  values = {
    'sae-harvest': binaries.small_harvest(root),
    'sae-train': {
      'store': root / 'store', 'workdir': root / 'train', 'n_latents': 512,
      'k': 8, 'batch_size': 64, 'steps': 30, 'sample_rows': 500,
    },
  }  # fmt: skip
  for stage, flags in values.items():
    ended = binaries.run(
      stage, *(f'--{name}={value}' for name, value in flags.items())
    )
    assert ended.returncode == 0, ended.stderr
  return root


def command(made, workdir, rows='store'):
  """A sae-probe of rows of a store, or of a stream, that saves often."""
  values = {
    rows: made / 'store' if rows == 'store' else True,
    'checkpoint': made / 'train', 'workdir': workdir,
    'n_tasks': 1, 'task_prompts': 16, 'downstream_tokens': 64,
    'batch_rows': 16, 'save_every_rows': 96,
  }  # fmt: skip
  flags = [f'--{name}={value}' for name, value in values.items()]
  return [sys.executable, '-m', 'sae_jax.cli.probe', *flags]


def stage_of(workdir):
  """What a sae-probe is doing."""
  for path, stage in (
    ('finished.json', 'had ended'),
    ('report.json', 'record'),
    ('features/manifest.json', 'report'),
    ('plots', 'seal'),
    ('features/latent_ids', 'shards of the table'),
    ('scratch', 'second pass'),
    ('features', 'votes and neighbours'),
    ('codes/codes.json', 'downstream'),
    ('scan', 'scan'),
    ('text/manifest.json', 'text is written'),
    ('text', 'text'),
    ('made_from.json', 'before the scan'),
  ):
    if (workdir / path).exists():
      return stage
  return 'load and tasks'


def wait_to_kill(kind, process, workdir, rng, seconds):
  """Waits for a random moment of a kind."""
  begun = {
    'scan': lambda: (
      len(list((workdir / 'scan').glob('codes-*.npz')))
      or (workdir / 'codes' / 'codes.json').exists()
    ),
    'table': lambda: (workdir / 'features' / 'begun.json').exists(),
  }
  if kind in begun:
    runs.wait_until(begun[kind], process)
    time.sleep(rng.uniform(0, 1.5))
  else:
    time.sleep(rng.uniform(0, seconds))


def contents(workdir):
  return {
    str(path.relative_to(workdir)): path.read_bytes()
    for path in pathlib.Path(workdir).rglob('*')
    if path.is_file()
  }


def assert_ends_as(whole, made, workdir, rows):
  """The same command makes what an uninterrupted one made, and no more."""
  runs.run(command(made, workdir, rows))
  got, want = contents(workdir), contents(whole)
  assert got.keys() == want.keys()
  assert [name for name in want if got[name] != want[name]] == []
  folders = {path.name for path in workdir.iterdir() if path.is_dir()}
  assert folders == {'features', 'plots'}


@pytest.mark.timeout(900 + 180 * KILLS)
@pytest.mark.parametrize('rows', ['store', 'stream'])
def test_killed_at_any_time_it_ends_with_the_same_bytes(
  made, tmp_path, capsys, rows
):
  whole, workdir = tmp_path / 'whole', tmp_path / 'killed'
  began = time.monotonic()
  runs.run(command(made, whole, rows))
  seconds = time.monotonic() - began
  assert {'report.json', 'features/manifest.json'} <= contents(whole).keys()
  rng, stages = random.Random(0), collections.Counter()
  for number in range(KILLS):
    kind = STAGES[number % len(STAGES)]
    done = 'codes/codes.json' if kind == 'scan' else 'finished.json'
    if (workdir / done).exists():
      assert_ends_as(whole, made, workdir, rows)
      shutil.rmtree(workdir)
    process = runs.start(command(made, workdir, rows))
    wait_to_kill(kind, process, workdir, rng, seconds)
    process.kill()
    process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)
    stages[stage_of(workdir)] += 1
  assert_ends_as(whole, made, workdir, rows)
  if KILLS > 1:
    with capsys.disabled():
      print(f'\n{seconds:.1f} s whole; killed during {dict(stages)}')
