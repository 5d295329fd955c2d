"""Runs that are killed, stopped or moved end as those left in peace."""

import os
import pathlib
import random
import signal
import time

import pytest

from sae_jax import checkpoint
from tests.support import runs

# One in each way; more on request.
KILLS = int(os.environ.get('SAE_JAX_RUN_KILLS', '3'))
EVERY = 40
# The run must not end before.
STEPS = 600 + 200 * KILLS


@pytest.fixture(scope='module')
def whole(store, tmp_path_factory):
  """The workdir of an uninterrupted run, which saved at its end alone."""
  workdir = str(tmp_path_factory.mktemp('runs') / 'whole')
  runs.run(command(store, workdir, checkpoint_every=0), devices=2)
  runs.assert_active(workdir)
  return workdir


def command(store, workdir, checkpoint_every=EVERY):
  """A run whose latents, and so its checkpoints, are over two devices."""
  return runs.command(
    store,
    workdir,
    steps=STEPS,
    checkpoint_every=checkpoint_every,
    mesh_latent=2,
  )


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


def test_killed_again_and_again_it_ends_with_the_same_bits(
  store, whole, tmp_path
):
  rng, workdir = random.Random(0), str(tmp_path / 'run')
  ways = ('writing', 'between', 'starting')
  kinds = [ways[i % len(ways)] for i in range(KILLS)]
  rng.shuffle(kinds)
  saved, torn, tries = [0], 0, 0
  while kinds:
    kind = kinds.pop()
    process = runs.start(command(store, workdir), devices=2)
    wait_to_kill(kind, process, workdir, rng)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    torn += bool(being_written(workdir))
    saved.append((runs.saved_steps(workdir) or [0])[-1])
    assert saved[-1] >= saved[-2]
    # What is to be killed while it is written may be whole by then.
    if kind == 'writing' and not torn and tries < 3:
      kinds.append(kind)
      tries += 1
  assert torn
  assert len(set(saved)) > KILLS // 2
  assert saved[-1] < STEPS
  runs.run(command(store, workdir), devices=2)
  runs.assert_same_run(workdir, whole)
  for average in (True, False):
    runs.assert_same_bits(
      checkpoint.load(workdir, average=average).sae,
      checkpoint.load(whole, average=average).sae,
    )
  assert not being_written(workdir)


def test_sigterm_saves_and_the_same_command_goes_on(store, whole, tmp_path):
  workdir = str(tmp_path / 'run')
  stopped = command(store, workdir, checkpoint_every=300)
  process = runs.start(stopped, devices=2)
  runs.wait_until(lambda: runs.saved_steps(workdir), process)
  process.terminate()
  out, said = runs.ended(process)
  done = runs.stopped_at(out, STEPS)
  assert f'SIGTERM: saved after step {done}' in said
  assert 300 <= done < STEPS
  assert runs.saved_steps(workdir)[-1] == done
  assert runs.rows(workdir)[-1]['step'] == done
  assert checkpoint.load(workdir).step == done
  out, _ = runs.run(stopped, devices=2)
  assert f'trained to step {STEPS}' in out and 'SIGTERM' not in out
  runs.assert_same_run(workdir, whole)


def test_an_interrupt_is_silent_and_the_run_goes_on(store, tmp_path):
  workdir = str(tmp_path / 'run')
  # On a machine that is busy a short run ends before it is looked at.
  interrupted = [*command(store, workdir), '--steps=100000']
  # Workers of tests ignore Ctrl-C, and a child inherits it.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  process = runs.start(interrupted, devices=2)
  signal.signal(signal.SIGINT, before)
  runs.wait_until(lambda: runs.saved_steps(workdir), process)
  process.send_signal(signal.SIGINT)
  _, said = runs.ended(process, -signal.SIGINT)
  assert 'Traceback' not in said and 'error' not in said
  # What it saved is whole: it goes on from there.
  done = checkpoint.load(workdir).step
  assert EVERY <= done < 100_000
  _, said = runs.run([*interrupted, f'--steps={done + 1}'], devices=2)
  assert f'resumes after step {done}' in said
