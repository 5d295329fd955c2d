"""A binary on a CPU says nothing of TPUs."""

import os
import pathlib
import subprocess
import sys

import pytest

from sae_jax.cli import backend
from tests.support import planted


def binary(name, platforms=None, **flags):
  """Runs a binary as in a plain shell, or with JAX_PLATFORMS."""
  environment = dict(os.environ)
  for variable in ('JAX_PLATFORMS', 'XLA_FLAGS', 'TF_CPP_MIN_LOG_LEVEL'):
    environment.pop(variable, None)
  if platforms is not None:
    environment['JAX_PLATFORMS'] = platforms
  return subprocess.run(
    [
      pathlib.Path(sys.executable).parent / name,
      *(f'--{flag}={value}' for flag, value in flags.items()),
    ],
    capture_output=True,
    text=True,
    env=environment,
  )


def of_tpus(text):
  """The lines that speak of TPUs."""
  return [line for line in text.splitlines() if 'tpu' in line.lower()]


@pytest.mark.skipif(
  backend.has_tpu() or backend._has_plugin(), reason='there is more than a CPU'
)
def test_a_run_on_a_cpu_says_nothing_of_tpus(tmp_path_factory):
  # A folder whose name is silent too.
  folder = tmp_path_factory.mktemp('quiet')
  store, workdir = str(folder / 'store'), str(folder / 'run')
  planted.write_store(store)
  small = {'n_latents': 64, 'k': 4, 'batch_size': 64, 'steps': 2}
  trained = binary('sae-train', store=store, workdir=workdir, **small)
  assert trained.returncode == 0, trained.stderr
  assert '1 local of 1 cpu devices' in trained.stderr
  assert not of_tpus(trained.stdout + trained.stderr)
  # It reads the checkpoint, on a device, before it looks for the subject.
  probe = {'store': store, 'checkpoint': workdir, 'workdir': str(folder / 'p')}
  probed = binary('sae-probe', **probe)
  assert probed.returncode == 2
  assert "subject 'planted', of which this was made, is not" in probed.stderr
  assert not of_tpus(probed.stdout + probed.stderr)
  # Control: JAX's own choice starts libtpu, which says so.
  assert of_tpus(binary('sae-probe', '', **probe).stderr)
