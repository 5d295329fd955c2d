"""Signals at any moment of a stage: how it ends, and what it says.

`SAE_JAX_SIGNALS=50` sends each signal at so many moments of each stage, from
its first to its last, and prints how they ended.
"""

import collections
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from sae_jax.cli import huge_pages
from tests.support import binaries, processes

MOMENTS = int(os.environ.get('SAE_JAX_SIGNALS', '0'))
STAGES = ('harvest', 'train', 'probe', 'browse', 'plan')


@pytest.fixture(scope='module')
def commands(tmp_path_factory):
  """The flags of each stage, whose inputs are there."""
  root = tmp_path_factory.mktemp('stages')
  values = {
    'harvest': binaries.small_harvest(root),
    'train': {
      'store': root / 'store', 'workdir': root / 'train', 'n_latents': 64,
      'k': 8, 'batch_size': 64, 'steps': 300, 'checkpoint_every': 50,
      'sample_rows': 500,
    },
    'probe': {
      'store': root / 'store', 'checkpoint': root / 'train',
      'workdir': root / 'probe', 'n_tasks': 1, 'task_prompts': 16,
      'downstream_tokens': 64,
    },
    'browse': {'probe': root / 'probe', 'workdir': root / 'page'},
    'plan': {
      'topology': 'v5e:2x2', 'd': 256, 'n': 8192, 'k': 8, 'batch': 1024,
      'mesh': '1x4',
    },
  }  # fmt: skip
  flags = {
    stage: [f'--{flag}={value}' for flag, value in named.items()]
    for stage, named in values.items()
  }
  for stage in STAGES[:-1] if MOMENTS else ():
    made = binaries.run(f'sae-{stage}', *flags[stage])
    assert made.returncode == 0, made.stderr
  outputs = {'harvest': 'store', 'train': 'train', 'probe': 'probe'}
  return flags, {s: root / n for s, n in (outputs | {'browse': 'page'}).items()}


def start(stage, flags, at_interrupt=signal.SIG_DFL):
  """A process that begins with this for Ctrl-C, whatever this one has."""
  return subprocess.Popen(
    [sys.executable, '-m', f'sae_jax.cli.{stage}', *flags],
    env=processes.environment(devices=1),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    # A shell's background jobs ignore it, and so does what they start.
    preexec_fn=lambda: signal.signal(signal.SIGINT, at_interrupt),
  )


def has_begun(process):
  """Whether a process is past the first line of `main`.

  There it blocks signals until it has seen to them; later it holds NumPy.
  """
  try:
    maps = pathlib.Path(f'/proc/{process.pid}/maps').read_text()
    return 'numpy' in maps or processes.has_set(
      process, 'SigBlk', signal.SIGTERM
    )
  except OSError:
    return True


def interrupted(stage, flags, number, seconds):
  """Sends a signal so long after `main` has begun; code, output and errors."""
  process = start(stage, flags)
  while not has_begun(process):
    time.sleep(0.0005)
  time.sleep(seconds)
  process.send_signal(number)
  out, said = process.communicate(timeout=120)
  return process.returncode, out, said


def assert_well_ended(stage, number, code, out, said):
  """How it ended, in a word."""
  assert 'Traceback' not in said and 'Exception ignored' not in said, said
  if stage == 'train' and number == signal.SIGTERM:
    assert code == 0, said
    for words in ('nothing to save yet', 'saved after step', 'trained to step'):
      if words in out + said:
        return words
    raise AssertionError((out, said))
  if code == 0:
    return 'had ended'
  assert code == -number, (code, said)
  assert not [line for line in said.splitlines() if 'rror' in line], said
  return f'by {signal.Signals(number).name}'


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('stage', STAGES)
def test_a_signal_while_a_stage_is_imported_is_no_traceback(
  stage, number, commands
):
  flags, _ = commands
  seconds = random.Random(f'{stage}{number}').uniform(0, 0.6)
  ended = interrupted(stage, flags[stage], number, seconds)
  how = assert_well_ended(stage, number, *ended)
  assert how in ('nothing to save yet', f'by {number.name}')


def test_a_background_job_goes_on_ignoring_an_interrupt(commands):
  """As a shell's `&` starts it, whose Ctrl-C is for the job in front."""
  flags, _ = commands
  process = start('plan', flags['plan'], at_interrupt=signal.SIG_IGN)
  while not has_begun(process):
    time.sleep(0.0005)
  process.send_signal(signal.SIGINT)
  with pytest.raises(subprocess.TimeoutExpired):
    process.wait(0.5)
  # It has begun again, once, on huge pages.
  if huge_pages.on_request():
    environment = pathlib.Path(f'/proc/{process.pid}/environ').read_bytes()
    assert environment.count(b'glibc.malloc.hugetlb=1') == 1
  process.kill()
  process.communicate()


@pytest.mark.skipif(not MOMENTS, reason='SAE_JAX_SIGNALS is not set')
# As many runs as there are moments, each of a minute on a loaded machine.
@pytest.mark.timeout(60 * (MOMENTS + 10))
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('stage', STAGES)
def test_a_signal_at_any_moment(stage, number, commands, capsys):
  flags, outputs = commands
  folder = outputs.get(stage)
  kept = folder and folder.with_name(f'{folder.name}_kept')
  if folder:
    folder.rename(kept)
  began = time.monotonic()
  whole = start(stage, flags[stage])
  whole.communicate()
  assert whole.returncode == 0
  seconds, rng = time.monotonic() - began, random.Random(0)
  ends = collections.Counter()
  for _ in range(MOMENTS):
    if folder:
      shutil.rmtree(folder)
    moment = rng.uniform(0, seconds)
    ended = interrupted(stage, flags[stage], number, moment)
    ends[assert_well_ended(stage, number, *ended)] += 1
    if folder:
      folder.mkdir(exist_ok=True)
  last = start(stage, flags[stage])
  _, said = last.communicate()
  assert last.returncode == 0, said
  if folder:
    shutil.rmtree(folder)
    kept.rename(folder)
  with capsys.disabled():
    print(f'\n{stage}, {number.name}, {seconds:.1f} s: {dict(ends)}')
