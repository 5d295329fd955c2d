"""Two processes of one mesh: what they train, and what they refuse."""

import os
import pathlib
import pickle

import jax
import numpy as np
import pytest

from sae_jax import checkpoint, errors
from sae_jax import subject as subject_lib
from sae_jax.harvesting import harvest
from sae_jax.storage import claim
from sae_jax.training import train
from tests.support import planted, processes, runs, step_runs, streams, toy


def test_two_processes_select_the_same_latents(tmp_path):
  code = (
    'import pickle, sys; from tests.support import step_runs as t; '
    'found = t.run(t.config(), (2, 4)); '
    'print(len(t.jax.local_devices()), "of", len(t.jax.devices())); '
    'pickle.dump(found[:3], open(sys.argv[1], "wb"))'
  )
  said = processes.run_two(code, [tmp_path / '0', tmp_path / '1'])
  assert all('4 of 8' in text for text in said)
  unsharded = step_runs.run(step_runs.config(), (1, 1))
  for number in '01':
    with open(tmp_path / number, 'rb') as file:
      step_runs.assert_same_run(pickle.load(file), unsharded)


def train_in_three(folder):
  """Trains in workdirs that are relative, so that folders are as hosts."""
  folder = pathlib.Path(folder)
  config = runs.train_config(steps=4, mesh_data=2, mesh_latent=4)
  for place in (folder, folder.parent / 'taken', folder.parent / 'shared'):
    os.chdir(place)
    try:
      state = train.train(config, str(folder.parent / 'store'), 'run')
      print('report:', 'trained to', state.step)
    except errors.UserError as error:
      print('report:', error)


def test_processes_that_do_not_share_the_workdir_are_refused(tmp_path):
  planted.write_store(str(tmp_path / 'store'))
  for name in ('0', '1', 'taken', 'shared'):
    (tmp_path / name).mkdir()
  code = 'import sys; from tests.mesh import test_two_processes as t; '
  code += 't.train_in_three(sys.argv[1])'
  with claim.claim(str(tmp_path / 'taken' / 'run')):
    said = processes.run_two(code, [tmp_path / '0', tmp_path / '1'])
  own, taken, shared = zip(
    *([s for s in text.splitlines() if s[:7] == 'report:'] for text in said)
  )
  for text in own:
    assert 'workdir run is local to a host: 1 of 2 processes do not' in text
  assert list((tmp_path / '0').rglob('*')) == [tmp_path / '0' / 'run']
  assert not list((tmp_path / '1').iterdir())
  # One that another process has is refused on both; none waits for the other.
  assert 'run is in use by another process' in taken[0]
  assert 'process 0 cannot use workdir run: see its error' in taken[1]
  assert not runs.saved_steps(tmp_path / 'taken' / 'run')
  # Control: the same where both see one folder.
  assert all('trained to 4' in text for text in shared)
  assert runs.saved_steps(tmp_path / 'shared' / 'run') == [4]
  assert not list((tmp_path / 'shared' / 'run').glob('.seen*'))


@pytest.mark.parametrize(
  'flags',
  [
    # The latents over all eight devices of two hosts.
    {'steps': 60, 'checkpoint_every': 20, 'mesh_latent': 8},
    # Each host has half of the tokens, and reads a lane of its own.
    {'steps': 40, 'mesh_latent': 4, 'lanes': 2},
  ],
)
def test_two_processes_train_what_one_does(store, tmp_path, flags):
  """Two hosts with four devices each."""
  two, one = str(tmp_path / 'two'), str(tmp_path / 'one')
  both = runs.start_two(runs.command(store, two, **flags))
  for process in both:
    runs.ended(process)
  train.train(runs.saved_config(two), store, one)
  got, want = runs.rows(two), runs.rows(one)
  assert [row['step'] for row in got] == [row['step'] for row in want]
  runs.assert_active(one)
  for a, b in zip(got, want):
    for name in b:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-8)
  for a, b in zip(
    jax.tree.leaves(checkpoint.load(two).sae),
    jax.tree.leaves(checkpoint.load(one).sae),
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_two_processes_stream_what_one_does(texts, tmp_path):
  """Two hosts of four devices: contexts, weights and latents over all."""
  folder = str(tmp_path / 'subject')
  subject_lib.save(toy.subject(), folder)
  url = str(tmp_path / 'store')
  config = toy.config(
    texts, subject=folder, n_tokens=streams.STORED, batch_contexts=8
  )
  harvest.harvest(config, url)
  flags = {
    'steps': 16, 'stream': True, 'eval_rows': 24, 'mesh_data': 4,
    'mesh_latent': 2, 'checkpoint_every': 8,
  }  # fmt: skip
  two, alone = str(tmp_path / 'two'), str(tmp_path / 'alone')
  for process in runs.start_two(runs.command(url, two, **flags)):
    runs.ended(process)
  train.train(runs.saved_config(two), url, alone)
  got, want = runs.rows(two), runs.rows(alone)
  assert len(got) == len(want) > 12
  for a, b in zip(got, want):
    for name in b:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-6)
