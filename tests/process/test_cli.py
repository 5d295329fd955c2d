"""The binaries: flags are the config's fields, errors are one line."""

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


def one_line(found, code, *parts):
  """The run failed with this code and one line that holds the parts."""
  assert found.returncode == code, found.stderr
  assert found.stdout == ''
  lines = [line for line in found.stderr.splitlines() if line]
  # Log lines of what went before may stand above.
  assert lines[-1].startswith('error: ')
  assert 'Traceback' not in found.stderr
  for part in parts:
    assert part in lines[-1]
  return lines


@pytest.mark.parametrize('name', binaries.MODULES)
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


@pytest.mark.parametrize(
  ('flags', 'part'),
  [
    (['--bogus=1'], "Unknown command line flag 'bogus'"),
    (['--k=many'], "flag --k=many: 'many' is not an integer: write"),
    (['--num_processes=1.5'], "'1.5' is not an integer"),
    (['--store=s'], '--workdir is required'),
    (['--store=s', '--workdir=w', 'extra'], "'extra' is not a flag"),
    (['--store=s', '--workdir=w', '--preprocessing=x'], 'should be one of'),
    (['--store=s', '--workdir=w', '--k=9999'], 'k 9999 exceeds n_latents 4096'),
  ],
)
def test_wrong_flags_exit_with_2_in_one_line(flags, part):
  lines = one_line(run('train', *flags), 2, part)
  assert len(lines) == 1


def test_missing_and_misfitting_input_exit_with_2(tmp_path):
  store, workdir = str(tmp_path / 'store'), str(tmp_path / 'run')
  one_line(
    run('train', f'--store={store}', f'--workdir={workdir}'),
    2,
    'is not a finished store',
  )
  planted.write_store(store)
  common = [f'--store={store}', f'--workdir={workdir}']
  one_line(
    run('train', *common, '--d_model=24', '--n_latents=64', '--k=4'),
    2,
    'd_model 24 is not the width 16',
  )
  one_line(run('probe', *common, f'--checkpoint={workdir}'), 2, 'no checkpoint')
  one_line(
    run('browse', f'--probe={workdir}', f'--workdir={workdir}'),
    2,
    'has no report.json',
  )
  one_line(
    run('harvest', f'--store={store}2', '--subject=gpt-9'),
    2,
    "subject 'gpt-9' is not known",
  )
  assert not (tmp_path / 'run').exists()


def test_urls_are_expanded_or_refused(tmp_path):
  store = f'--store={tmp_path}/none'
  one_line(run('train', store, '--workdir='), 2, 'workdir is empty')
  one_line(
    run('train', store, '--workdir=az://b/run'),
    2,
    'workdir az://b/run is no URL that is known: use a local path or a '
    'gs:// or s3:// URL',
  )
  one_line(
    run('train', '--store=~/no_such_store', '--workdir=w'),
    2,
    os.path.expanduser('~/no_such_store'),
  )


def test_a_workdir_that_cannot_be_made_is_one_line(tmp_path):
  planted.write_store(str(tmp_path / 'store'))
  (tmp_path / 'file').write_text('')
  found = run(
    'train', f'--store={tmp_path}/store', f'--workdir={tmp_path}/file/run',
    '--n_latents=64', '--k=4', '--batch_size=64', '--steps=2',
  )  # fmt: skip
  one_line(found, 2, 'check the path, free space and your access')


def test_debug_shows_the_traceback(tmp_path):
  found = run('train', f'--store={tmp_path}', '--workdir=w', '--debug')
  assert found.returncode != 0
  assert 'Traceback' in found.stderr


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


@pytest.mark.parametrize(
  ('sweep', 'part'),
  [
    (['colour=1,2'], '--sweep=colour=1,2 is not a field of its own'),
    (['store=a,b'], 'a run has no field store to sweep: use some of'),
    (['k'], '--sweep=k is not a field of its own and its values'),
    (['k='], '--sweep=k= is not a field'),
    (['k=1,2', 'k=3'], '--sweep=k=3 is not a field of its own'),
    (['k=1,many'], "--sweep=k=1,many: 'many' is not an integer"),
    (['k=1,'], "--sweep=k=1,: '' is not an integer"),
    (['learning_rate=fast'], 'could not convert string to float'),
    (['activation=sine'], 'should be one of'),
    (['k=2,9999'], 'k 9999 exceeds n_latents 64'),
    (['batch_size=64,128'], 'batch_size differs between runs'),
  ],
)
def test_a_wrong_sweep_is_refused_in_one_line(swept, tmp_path, sweep, part):
  command = runs.command(swept[0], str(tmp_path / 'run'))
  out, said = runs.run([*command, *(f'--sweep={s}' for s in sweep)], code=2)
  lines = said.splitlines()
  assert out == '' and len(lines) == 1
  assert lines[0].startswith('error: ') and part in lines[0]
  assert not (tmp_path / 'run').exists()


@pytest.fixture(scope='module')
def swept(tmp_path_factory):
  """A store, the folder of a sweep over it, and what the sweep said."""
  folder = tmp_path_factory.mktemp('sweep')
  store, workdir = str(folder / 'store'), folder / 'runs'
  planted.write_store(store)
  command = runs.command(store, str(workdir))
  out, _ = runs.run([*command, '--sweep=k=2,4', '--sweep=activation=topk,relu'])
  return store, workdir, out


def test_a_sweep_trains_all_combinations(swept, tmp_path):
  store, workdir, out = swept
  names = [f'k={k}_activation={a}' for k in (2, 4) for a in ('topk', 'relu')]
  assert sorted(path.name for path in workdir.iterdir()) == sorted(names)
  assert out.splitlines() == [
    f'{workdir / name}: trained to step 30' for name in names
  ]
  alone = str(tmp_path / 'alone')
  runs.run(runs.command(store, alone, k=2))
  runs.assert_same_run(str(workdir / 'k=2_activation=topk'), alone)


def test_a_run_that_is_longer_than_asked_is_left_alone(swept):
  store, workdir, _ = swept
  one = str(workdir / 'k=4_activation=topk')
  out, _ = runs.run(runs.command(store, one, k=4, steps=20))
  assert out == f'{one}: trained to step 30\n'


def test_debug_nans_stops_where_one_is_made(tmp_path):
  store = str(tmp_path / 'store')
  runs.write_spoilt_store(store)
  command = runs.command(store, str(tmp_path / 'run'), sample_rows=50)
  _, said = runs.run([*command, '--debug_nans'], code=1)
  assert 'Traceback' not in said
  last = said.splitlines()[-1]
  assert last.startswith('error: invalid value (nan) encountered in sub')
  # Control: without it the step is named and no operation.
  _, said = runs.run(command, code=1)
  last = said.splitlines()[-1]
  assert last.startswith('error: loss nan') and 'encountered' not in last


def test_debug_nans_changes_no_metric(swept, tmp_path):
  store, workdir, _ = swept
  debugged = str(tmp_path / 'run')
  runs.run([*runs.command(store, debugged, k=2), '--debug_nans'])
  assert runs.log(debugged) == runs.log(workdir / 'k=2_activation=topk')


def test_a_workdir_in_use_is_refused_until_its_run_is_dead(swept, tmp_path):
  workdir = str(tmp_path / 'run')
  command = runs.command(swept[0], workdir, steps=10**6, checkpoint_every=20)
  first = runs.start(command)
  try:
    runs.wait_until(lambda: runs.saved_steps(workdir), first)
    out, said = runs.run(command, code=2)
    assert out == ''
    assert said.splitlines()[-1] == (
      f'error: {workdir} is in use by another process: wait until it has '
      'ended, or use another workdir'
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
RESTARTS = (
  huge_pages.platform.libc_ver()[0] == 'glibc' and huge_pages._on_request()
)
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
  if not RESTARTS:
    after, begins = before, 1
  found = restarted('-O', '-c', RESTART, 'a b', '--c=d', tunables=before)
  assert found.returncode == 7, found.stderr
  *began, last = found.stdout.splitlines()
  assert began == ['began'] * begins
  assert last == f"{after} ['a b', '--c=d'] 1"


@pytest.mark.parametrize('tunables', [None, OURS])
def test_a_binary_keeps_its_flags_and_exit_code(tunables):
  module = ['-m', 'sae_jax.cli.train']
  found = restarted(*module, '--help', tunables=tunables)
  assert found.returncode == 0
  assert found.stdout.startswith('sae-train: ')
  found = restarted(*module, '--k=one two', tunables=tunables)
  assert found.returncode == 2
  assert 'flag --k=one two' in found.stderr
