"""Harvests that are killed, or shared by processes, end with the same bytes."""

import collections
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sae_jax import errors, store
from tests.support import toy

# How often a harvest is killed; more on request.
KILLS = int(os.environ.get('SAE_JAX_KILLS', '3'))


def start(path, url, index=0, count=1):
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      'tests.support.harvest_child',
      path,
      url,
      f'{index}',
      f'{count}',
    ],
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'TF_CPP_MIN_LOG_LEVEL': '3'},
  )


def test_killed_at_any_time_it_ends_with_the_same_bytes(texts, tmp_path):
  began = time.monotonic()
  child = start(texts, tmp_path / 'clean')
  assert child.stdout.readline() == 'ready\n'
  ready = time.monotonic()
  assert child.communicate()[0] == 'sealed\n'
  length = time.monotonic() - ready
  assert length < 60, f'{began - ready} s to start, {length} s to harvest'
  want = toy.stored(tmp_path / 'clean')

  rng, some = np.random.default_rng(0), 0
  url = tmp_path / 'store'
  for moment in range(KILLS):
    child = start(texts, url)
    assert child.stdout.readline() == 'ready\n'
    # From before the first write to the last ones; what is there stays.
    time.sleep((moment + rng.random()) / KILLS * length)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    there = toy.stored(url) if url.exists() else {}
    some += 0 < len(there) < len(want)
    assert all(want[name] == data for name, data in there.items())
    if len(there) == len(want):
      shutil.rmtree(url)
  child = start(texts, url)
  child.communicate()
  assert child.returncode == 0
  assert toy.stored(url) == want
  assert some >= KILLS // 3


def test_two_processes_make_one_store(texts, tmp_path):
  want = start(texts, tmp_path / 'one')
  want.communicate()
  children = [start(texts, tmp_path / 'two', i, 2) for i in range(2)]
  said = [child.communicate()[0].split()[-1] for child in children]
  assert 'sealed' in said
  assert toy.stored(tmp_path / 'two') == toy.stored(tmp_path / 'one')


def test_flipped_bytes_are_found_and_named(texts, tmp_path):
  manifest = toy.run(toy.config(texts), tmp_path / 'store')
  folder = tmp_path / 'store'
  paths = sorted(p for p in folder.glob('**/c/**/*') if p.is_file())
  paths += sorted((folder / 'shards').iterdir())
  opened = store.open_store(str(folder))
  opened.verify()
  # Two of each kind: of every array, and of what counts the rows.
  kinds = collections.defaultdict(list)
  for path in paths:
    kinds[path.relative_to(folder).parts[0]].append(path)
  assert len(kinds) > 4
  rng = np.random.default_rng(0)
  for path in itertools.chain(*(rng.choice(kinds[k], 2) for k in kinds)):
    whole = path.read_bytes()
    place = rng.integers(len(whole))
    damaged = bytearray(whole)
    damaged[place] ^= 1 << rng.integers(8)
    path.write_bytes(damaged)
    name = str(path.relative_to(folder))
    with pytest.raises(errors.UserError, match='1 objects of store') as caught:
      store.open_store(str(folder)).verify()
    assert f'{name} ' in str(caught.value)
    path.write_bytes(whole)
  assert store.open_store(str(folder)).verify() > manifest.n_rows * 16 * 4
