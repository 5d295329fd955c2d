"""Full disks and refused writes: one line, nothing lost, and it goes on.

A full disk is a limit on the size of files here, which needs no rights and
whose errors take the same way. What is refused is so to root too: a file where
a folder should be, /proc, a bucket that answers 403.
"""

import os
import subprocess
import sys

import pytest

from sae_jax import store as store_lib
from sae_jax.store import layout
from tests.support import planted, runs, toy

REMEDY = 'check the path, free space and your access'
_LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""


def run(command, n_bytes=None):
  """Runs a command that can write no file beyond a size; code and errors."""
  limit = [sys.executable, '-c', _LIMITED, str(n_bytes)]
  found = subprocess.run(
    [*(limit if n_bytes is not None else []), *map(str, command)],
    env=os.environ
    | {
      'JAX_PLATFORMS': 'cpu',
      'TF_CPP_MIN_LOG_LEVEL': '3',
      'PYTHONDONTWRITEBYTECODE': '1',
    }
    # No compiled program may be half there for others.
    | (
      {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '1e9'}
      if n_bytes is not None
      else {}
    ),
    capture_output=True,
    text=True,
    timeout=300,
  )
  return found.returncode, found.stderr.splitlines()


def harvest(texts, url, n_bytes=None, index=0, count=1):
  command = [sys.executable, '-m', 'tests.support.harvest_child']
  return run([*command, texts, url, index, count], n_bytes)


def test_a_harvest_on_a_full_disk_goes_on_when_there_is_room(texts, tmp_path):
  clean, url = tmp_path / 'clean', tmp_path / 'store'
  assert harvest(texts, clean)[0] == 0
  want = toy.stored(clean)
  # One process's shards are there; then there is room for none of 4 KB.
  assert harvest(texts, url, None, 0, 2)[0] == 0
  there = toy.stored(url)
  assert 20 < len(there) < len(want)
  code, said = harvest(texts, url, 2000)
  assert code == 1
  error = 'sae_jax.errors.UserError: cannot write store '
  assert said[-1].startswith(f'{error}{url}: ')
  assert 'File too large' in said[-1]
  assert said[-1].endswith(f'{REMEDY}; the same command goes on')
  # What was there stays, and what came is whole.
  now = toy.stored(url)
  assert now.items() >= there.items()
  assert all(want[name] == data for name, data in now.items())
  assert layout.read_manifest(str(url)) is None
  assert harvest(texts, url)[0] == 0
  assert toy.stored(url) == want
  store_lib.open_store(str(url)).verify()


def command(folder, name, steps):
  return runs.command(
    folder / 'store',
    folder / name,
    n_latents=512,
    steps=steps,
    checkpoint_every=10,
    # Orbax forgets the last one as soon as it begins the next.
    checkpoint_keep=1,
  )


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
  """A run of 10 steps, and the same one gone on to 30."""
  folder = tmp_path_factory.mktemp('begun')
  planted.write_store(str(folder / 'store'))
  for steps in (10, 30):
    assert run(command(folder, 'whole', steps))[0] == 0
  return folder


def test_training_on_a_full_disk_goes_on_when_there_is_room(begun):
  assert run(command(begun, 'run', 10))[0] == 0
  workdir = begun / 'run'
  before = runs.log(workdir)
  # Room for the log and for no checkpoint, for no log, for nothing.
  for n_bytes in (30_000, len(before) + 100, 0):
    code, said = run(command(begun, 'run', 30), n_bytes)
    assert code == 2
    assert 'Traceback' not in '\n'.join(said)
    (error,) = (line for line in said if line.startswith('error: '))
    assert str(workdir) in error and 'File too large' in error
    assert REMEDY in error
    if n_bytes:
      assert f'checkpoints of {workdir} (that of step 10 is good)' in error
      assert error.endswith('the same command goes on')
    assert runs.saved_steps(workdir) == [10]
    assert not list(workdir.glob('.*partial'))
    assert runs.log(workdir).startswith(before)
  assert run(command(begun, 'run', 30))[0] == 0
  assert runs.saved_steps(workdir) == [30]
  runs.assert_same_run(str(workdir), str(begun / 'whole'))
