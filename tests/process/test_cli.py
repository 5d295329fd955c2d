"""The binaries as processes: output, exit codes, starting again."""

import importlib
from importlib import metadata
import os
import pathlib
import subprocess
import sys

import pytest

from sae_jax.cli import huge_pages
from tests.support import binaries, planted, runs


def run(name, *flags):
  return subprocess.run(
    [sys.executable, '-m', f'sae_jax.cli.{name}', *flags],
    capture_output=True,
    text=True,
    env=os.environ | {'TF_CPP_MIN_LOG_LEVEL': '3'},
  )


def test_every_binary_is_a_console_script():
  scripts = {
    script.name: script.load()
    for script in metadata.entry_points(group='console_scripts')
    if script.value.startswith('sae_jax.')
  }
  assert scripts == {
    name: importlib.import_module(f'sae_jax.cli.{name[4:]}').main
    for name in binaries.MODULES
  }
  folder = pathlib.Path(sys.executable).parent
  assert all((folder / name).exists() for name in scripts)


@pytest.mark.parametrize('name', ['sae-train'])
def test_help_of_a_console_script_lists_every_flag(name):
  script = pathlib.Path(sys.executable).parent / name
  found = subprocess.run([script, '--help'], capture_output=True, text=True)
  assert found.returncode == 0, found.stderr
  assert found.stdout.startswith(f'{name}: ')
  expected = binaries.flags_of(name)
  assert not binaries.missing_in_help(found.stdout, expected)
  # Control: of a flag that the binary does not have.
  expected['colour'] = 'of the page'
  assert binaries.missing_in_help(found.stdout, expected) == {'colour'}


def test_a_training_run_reports_and_writes(tmp_path):
  store, workdir = str(tmp_path / 'store'), tmp_path / 'run'
  planted.write_store(store)
  found = run(
    'train', f'--store={store}', f'--workdir={workdir}', '--n_latents=64',
    '--k=4', '--batch_size=64', '--steps=12', '--mesh_latent=1',
  )  # fmt: skip
  assert found.returncode == 0, found.stderr
  # Not a terminal: plain lines, ours alone.
  assert 'process 0 of 1' in found.stderr
  assert 'train: 100%' in found.stderr
  assert '\r' not in found.stderr
  assert 'orbax' not in found.stderr
  names = {path.name for path in workdir.iterdir()}
  assert names == {'config.json', 'metrics.jsonl', 'checkpoints', 'tensorboard'}


def test_a_workdir_in_use_is_refused_until_its_run_is_dead(store, tmp_path):
  workdir = str(tmp_path / 'run')
  command = runs.command(store, workdir, steps=10**6, checkpoint_every=20)
  first = runs.start(command)
  try:
    runs.wait_until(lambda: runs.saved_steps(workdir), first)
    out, said = runs.run(command, code=2)
    assert out == ''
    assert said.splitlines()[-1] == (
      f'error: {workdir} is in use by another process: wait until it has '
      'ended, or use another folder'
    )
    assert first.poll() is None
  finally:
    first.kill()
    first.communicate()
  last = runs.saved_steps(workdir)[-1]
  second = runs.start(command)
  runs.wait_until(lambda: runs.saved_steps(workdir)[-1] > last, second)
  second.kill()
  second.communicate()


def restarted(*arguments, tunables=None):
  """Runs Python; without tunables as in a plain shell."""
  environment = dict(os.environ)
  environment.pop('GLIBC_TUNABLES', None)
  if tunables is not None:
    environment['GLIBC_TUNABLES'] = tunables
  return subprocess.run(
    [sys.executable, *arguments],
    capture_output=True,
    text=True,
    env=environment,
    timeout=120,
  )


RESTART = """
import os, sys
print('began', flush=True)
from sae_jax.cli import huge_pages
huge_pages.use_huge_pages()
print(os.environ.get('GLIBC_TUNABLES'), sys.argv[1:], sys.flags.optimize)
sys.exit(7)
"""
OURS = 'glibc.malloc.hugetlb=1'


@pytest.mark.parametrize(
  ('before', 'after', 'begins'),
  [
    (None, OURS, 2),
    ('', OURS, 2),
    ('glibc.malloc.check=0', f'glibc.malloc.check=0:{OURS}', 2),
    ('glibc.malloc.hugetlb=0', 'glibc.malloc.hugetlb=0', 1),
    (OURS, OURS, 1),
  ],
)
def test_a_program_starts_again_once_as_it_was(before, after, begins):
  if not huge_pages.on_request():
    after, begins = before, 1
  found = restarted('-O', '-c', RESTART, 'a b', '--c=d', tunables=before)
  assert found.returncode == 7, found.stderr
  *began, last = found.stdout.splitlines()
  assert began == ['began'] * begins
  assert last == f"{after} ['a b', '--c=d'] 1"


def test_a_binary_keeps_its_flags_and_exit_code():
  found = restarted('-m', 'sae_jax.cli.browse', '--title=a b', 'c d')
  assert found.returncode == 2
  assert 'error: --probe is required' in found.stderr
