"""Runs of several processes are stopped, and move over meshes."""

import dataclasses
import json
import pathlib
import signal

import jax
import numpy as np

from sae_jax.training import train
from tests.support import planted, processes, runs


def rest_and_whole(store, folder):
  """Ends a stopped run and does all of it again, in one of two processes."""
  config = runs.saved_config(f'{folder}/run')
  config = dataclasses.replace(config, checkpoint_every=0)
  for name in ('run', 'whole'):
    train.train(config, store, f'{folder}/{name}')


def test_sigterm_to_one_of_two_processes_stops_both(store, tmp_path):
  workdir, whole = str(tmp_path / 'run'), str(tmp_path / 'whole')
  flags = {'steps': 120, 'mesh_latent': 1}
  # A checkpoint tells that it runs; it ends before there are many.
  both = runs.start_two(
    runs.command(store, workdir, **flags, checkpoint_every=10)
  )
  runs.wait_until(lambda: runs.saved_steps(workdir), *both)
  both[1].terminate()
  done = {runs.stopped_at(runs.ended(process)[0], 120) for process in both}
  assert len(done) == 1
  assert runs.saved_steps(workdir)[-1:] == list(done)
  # Both in one pair of processes: to start one takes longer than to train.
  code = 'import sys; from tests.mesh import test_preemption as t; '
  code += f't.rest_and_whole({store!r}, sys.argv[1])'
  processes.run_two(code, [tmp_path] * 2)
  runs.assert_same_run(workdir, whole)


def test_sigterm_before_two_processes_have_joined_stops_both(store, tmp_path):
  workdir = str(tmp_path / 'run')
  both = runs.start_two(
    runs.command(store, workdir, steps=10**6, checkpoint_every=0, mesh_latent=1)
  )
  # While it imports what is heavy: alone it would end, and leave the other.
  runs.wait_until(
    lambda: processes.has_set(both[0], 'SigCgt', signal.SIGTERM), *both
  )
  both[0].terminate()
  done = {runs.stopped_at(runs.ended(process)[0], 10**6) for process in both}
  assert runs.saved_steps(workdir) == list(done)


def config_of(data, latent):
  """The config of one part of a chain over meshes."""
  return runs.train_config(steps=60, mesh_data=data, mesh_latent=latent)


def last_part(folder):
  """Ends the chain in one of two processes; writes what it trained on."""
  folder, chain = pathlib.Path(folder), pathlib.Path(folder).parent
  with runs.batches_seen() as seen:
    train.train(config_of(2, 4), str(chain / 'store'), str(chain / 'run'))
  (folder / 'seen.json').write_text(json.dumps(seen))


def test_a_run_moves_over_meshes_and_processes(tmp_path):
  store, workdir, whole = (str(tmp_path / n) for n in ('store', 'run', 'whole'))
  planted.write_store(store)
  with runs.batches_seen() as want:
    train.train(config_of(1, 8), store, whole)
  with runs.batches_seen() as seen:
    runs.break_off(27, {workdir: config_of(1, 8)}, store)
    assert runs.saved_steps(workdir)[-1] == 20
    runs.break_off(45, {workdir: config_of(4, 2)}, store)
    assert runs.saved_steps(workdir)[-1] == 40
  for name in '01':
    (tmp_path / name).mkdir()
  code = 'import sys; from tests.mesh import test_preemption as t; '
  processes.run_two(
    f'{code} t.last_part(sys.argv[1])', [tmp_path / '0', tmp_path / '1']
  )
  assert [step for step, _ in want] == list(range(60))
  assert set(seen) <= set(want)
  # Each of the two processes reads its half of the batches.
  lasts = [
    json.loads((tmp_path / name / 'seen.json').read_text()) for name in '01'
  ]
  for (step, first), (same, second), wanted in zip(*lasts, want[40:]):
    assert (step, same, f'{first} {second}') == (step, step, wanted[1])
  assert [step for step, _ in lasts[0]] == list(range(40, 60))
  got, rows = runs.rows(workdir), runs.rows(whole)
  assert [row['step'] for row in got] == [row['step'] for row in rows]
  for a, b in zip(got, rows):
    for name in b:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-9)
  runs.assert_active(whole)
  a, b = runs.saved_state(workdir), runs.saved_state(whole)
  np.testing.assert_array_equal(a.silent_N, b.silent_N)
  for part in ('sae', 'optimizer'):
    for x, y in zip(*(jax.tree.leaves(getattr(s, part)) for s in (a, b))):
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
