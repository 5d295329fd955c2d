"""The binaries: flags are the config's fields, errors are one line."""

import os
import pathlib
import subprocess
import sys

import pytest

from sae_jax import config
from sae_jax.activations.harvest import HarvestConfig
from sae_jax.browser.index import BrowseConfig
from sae_jax.probing.report import ProbeConfig
from sae_jax.step import TrainConfig
from tests import planted

pytestmark = pytest.mark.slow

CONFIGS = {
  'harvest': HarvestConfig,
  'train': TrainConfig,
  'probe': ProbeConfig,
  'browse': BrowseConfig,
}


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


@pytest.mark.parametrize('name', CONFIGS)
def test_help_lists_every_field_with_its_help(name):
  found = run(name, '--help')
  assert found.returncode == 0
  text = ' '.join(found.stdout.split())
  for field in config.leaves(CONFIGS[name]):
    assert f'{field.name}: ' in text
    assert ' '.join(field.metadata['help'].split()) in text


def test_console_scripts_are_installed():
  folder = pathlib.Path(sys.executable).parent
  for name in CONFIGS:
    found = subprocess.run(
      [folder / f'sae-{name}', '--help'], capture_output=True, text=True
    )
    assert found.returncode == 0
    assert found.stdout.startswith(f'sae-{name}: ')


@pytest.mark.parametrize(
  ('flags', 'part'),
  [
    (['--bogus=1'], "Unknown command line flag 'bogus'"),
    (['--k=many'], 'flag --k=many'),
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
    run('train', store, '--workdir=s3://b/run'),
    2,
    'workdir s3://b/run is neither a local path nor a gs:// URL',
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
  one_line(found, 2, 'check the path and its permissions')


def test_debug_shows_the_traceback(tmp_path):
  found = run('train', f'--store={tmp_path}', '--workdir=w', '--debug')
  assert found.returncode != 0
  assert 'Traceback' in found.stderr


def test_a_training_run_reports_and_writes(tmp_path):
  store, workdir = str(tmp_path / 'store'), tmp_path / 'run'
  planted.write_store(store)
  found = run(
    'train', f'--store={store}', f'--workdir={workdir}', '--n_latents=64',
    '--k=4', '--batch_size=64', '--steps=12', '--mesh_latent=8',
  )  # fmt: skip
  assert found.returncode == 0, found.stderr
  # Not a terminal: plain lines, ours alone.
  assert 'process 0 of 1' in found.stderr
  assert 'train: 100%' in found.stderr
  assert '\r' not in found.stderr
  assert 'orbax' not in found.stderr
  names = {path.name for path in workdir.iterdir()}
  assert names == {'config.json', 'metrics.jsonl', 'checkpoints', 'tensorboard'}
