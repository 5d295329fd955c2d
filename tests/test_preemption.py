"""Runs that are killed, stopped or moved end as those left in peace."""

import json
import os
import pathlib
import random
import re
import signal
import threading
import time

import jax
import numpy as np
import pytest

from sae_jax import checkpoint
from sae_jax.training import preemption, run, train
from tests import planted, processes, runs

# More on request, 20 at most: the run must not end before.
KILLS = int(os.environ.get('SAE_JAX_RUN_KILLS', '5'))
STEPS = 2400
EVERY = 40


@pytest.fixture(scope='module')
def whole(store, tmp_path_factory):
  """The workdir of an uninterrupted run, which saved at its end alone."""
  workdir = str(tmp_path_factory.mktemp('runs') / 'whole')
  runs.run(runs.command(store, workdir, steps=STEPS, checkpoint_every=0))
  runs.assert_active(workdir)
  return workdir


def being_written(workdir):
  """Checkpoints that are begun and not finished."""
  return list(pathlib.Path(workdir, 'checkpoints').glob('*-checkpoint-tmp*'))


def wait_to_kill(kind, process, workdir, rng):
  """Waits for a random moment of a kind."""
  before = runs.saved_steps(workdir)[-1:] or [0]
  wanted = before[0] + EVERY * rng.randint(1, 2)
  if kind == 'starting':
    time.sleep(rng.uniform(0, 4))
    return
  runs.wait_until(
    lambda: runs.saved_steps(workdir)[-1:] >= [wanted - EVERY + 1], process
  )
  if kind == 'between':
    time.sleep(rng.uniform(0, 0.1))
    return
  runs.wait_until(lambda: being_written(workdir), process)
  time.sleep(rng.uniform(0, 0.02))


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bits(
  store, whole, tmp_path
):
  rng, workdir = random.Random(0), str(tmp_path / 'run')
  command = runs.command(store, workdir, steps=STEPS, checkpoint_every=EVERY)
  # Half of them while a checkpoint is written.
  order = ('writing', 'between', 'writing', 'starting')
  kinds = [order[i % len(order)] for i in range(KILLS)]
  rng.shuffle(kinds)
  saved, torn = [0], 0
  for kind in kinds:
    process = runs.start(command)
    wait_to_kill(kind, process, workdir, rng)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    torn += bool(being_written(workdir))
    saved.append((runs.saved_steps(workdir) or [0])[-1])
    assert saved[-1] >= saved[-2]
  assert torn >= max(1, KILLS // 6)
  assert len(set(saved)) > KILLS // 2
  assert saved[-1] < STEPS
  runs.run(command)
  runs.assert_same_run(workdir, whole)
  for average in (True, False):
    runs.assert_same_bits(
      checkpoint.load(workdir, average=average).sae,
      checkpoint.load(whole, average=average).sae,
    )
  assert not being_written(workdir)


STOPPED = re.compile(
  r'stopped by SIGTERM and saved after step (\d+), '
  r'the same command does the (\d+) that are left'
)


def stopped_at(said, steps):
  """The step that a stopped run says it was saved after."""
  done, left = map(int, STOPPED.search(said).groups())
  assert done + left == steps
  return done


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(store, whole, tmp_path):
  workdir = str(tmp_path / 'run')
  command = runs.command(store, workdir, steps=STEPS, checkpoint_every=300)
  process = runs.start(command)
  runs.wait_until(lambda: runs.saved_steps(workdir), process)
  process.terminate()
  out, said = runs.ended(process)
  done = stopped_at(out, STEPS)
  assert f'SIGTERM: saved after step {done}' in said
  assert 300 <= done < STEPS
  assert runs.saved_steps(workdir)[-1] == done
  assert runs.rows(workdir)[-1]['step'] == done
  assert checkpoint.load(workdir).step == done
  out, _ = runs.run(command)
  assert f'trained to step {STEPS}' in out and 'SIGTERM' not in out
  runs.assert_same_run(workdir, whole)


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both(store, tmp_path):
  workdir, whole = str(tmp_path / 'run'), str(tmp_path / 'whole')
  flags = {'steps': 120, 'mesh_latent': 1}
  # A checkpoint tells that it runs; it ends before there are many.
  both = runs.start_two(
    runs.command(store, workdir, **flags, checkpoint_every=10)
  )
  runs.wait_until(lambda: runs.saved_steps(workdir), *both)
  both[1].terminate()
  done = {stopped_at(runs.ended(process)[0], 120) for process in both}
  assert len(done) == 1
  assert runs.saved_steps(workdir)[-1:] == list(done)
  for path in (workdir, whole):
    command = runs.command(store, path, **flags, checkpoint_every=0)
    for process in runs.start_two(command):
      runs.ended(process)
  runs.assert_same_run(workdir, whole)


def config_of(data, latent):
  """The config of one part of a chain over meshes."""
  return runs.train_config(steps=60, mesh_data=data, mesh_latent=latent)


def last_part(folder):
  """Ends the chain in one of two processes; writes what it trained on."""
  folder, chain = pathlib.Path(folder), pathlib.Path(folder).parent
  with runs.batches_seen() as seen:
    train.train(config_of(2, 4), str(chain / 'store'), str(chain / 'run'))
  (folder / 'seen.json').write_text(json.dumps(seen))


@pytest.mark.slow
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
  code = 'import sys; from tests import test_preemption as t; '
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


@pytest.mark.fast
def test_a_notice_lasts_as_long_as_it_is_open():
  before = signal.getsignal(signal.SIGTERM)
  with preemption.Notice() as notice:
    assert not notice.asked(1)
    signal.raise_signal(signal.SIGTERM)
    assert notice.asked(2) and notice.asked(3)
  assert signal.getsignal(signal.SIGTERM) is before
  with preemption.Notice() as notice:
    assert not notice.asked(1)


@pytest.mark.fast
def test_outside_of_the_main_thread_nothing_is_noticed(store, tmp_path):
  before, states = signal.getsignal(signal.SIGTERM), []

  def work():
    config = planted.train_config(steps=3)
    states.append(train.train(config, store, str(tmp_path / 'run')))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert int(states[0].step) == 3
  assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.fast
def test_sigterm_between_steps_saves_that_step(store, tmp_path, monkeypatch):
  advance = run.Run.advance

  def raises(self, batch_BD):
    advance(self, batch_BD)
    if self.done == 17:
      signal.raise_signal(signal.SIGTERM)

  config = planted.train_config()
  whole = train.train(config, store, str(tmp_path / 'whole'))
  monkeypatch.setattr(run.Run, 'advance', raises)
  workdir = str(tmp_path / 'run')
  state = train.train(config, store, workdir)
  assert int(state.step) == 17
  assert runs.saved_steps(workdir)[-1] == 17
  monkeypatch.undo()
  state = train.train(config, store, workdir)
  runs.assert_same_bits(state, whole)
  runs.assert_same_run(workdir, str(tmp_path / 'whole'))


@pytest.mark.slow
def test_an_interrupt_is_one_line_and_the_run_goes_on(store, tmp_path):
  workdir = str(tmp_path / 'run')
  command = runs.command(store, workdir, steps=STEPS, checkpoint_every=EVERY)
  process = runs.start(command)
  runs.wait_until(lambda: runs.saved_steps(workdir), process)
  process.send_signal(signal.SIGINT)
  _, said = runs.ended(process, 130)
  assert 'Traceback' not in said
  assert said.splitlines()[-1].startswith('error: interrupted')
  # What it saved is whole: it goes on from there.
  done = checkpoint.load(workdir).step
  assert EVERY <= done < STEPS
  _, said = runs.run([*command, f'--steps={done + 1}'])
  assert f'resumes after step {done}' in said
