"""sae-plan, the binary."""

import json
import os
import signal
import subprocess
import sys
import types

from sae_jax.plan.program import text as text_lib
from sae_jax.tpu import aot
from tests.support import processes


def run(*flags):
  return subprocess.run(
    [sys.executable, '-m', 'sae_jax.cli.plan', *flags],
    capture_output=True,
    text=True,
    env=os.environ | {'TF_CPP_MIN_LOG_LEVEL': '3'},
  )


def test_the_binary_prints_a_table_and_writes_json_and_hlo(tmp_path):
  out, text = tmp_path / 'plan.json', tmp_path / 'step.txt'
  done = run(
    '--topology=v5e:2x2', '--num_slices=1', '--d=256', '--n=2048', '--k=8',
    '--batch=256', '--k_aux=0', '--mesh=auto', '--tokens=1000000',
    '--price_per_chip_hour=1.2', f'--json={out}', f'--emit_hlo={text}',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('nothing here was measured')
  figures = json.loads(out.read_text())
  assert {'fits', 'hbm_per_chip_gib', 'roofline_step_s'} <= set(figures)
  assert figures['config']['sae']['n_latents'] == 2048
  assert text_lib.parse(text.read_text()).entry.instructions
  wrong = run('--topology=v6e:3x3', '--d=256')
  assert wrong.returncode == 2 and wrong.stdout == ''
  assert wrong.stderr.strip().endswith('use v6e:4x4')


def test_the_compiler_does_not_take_sigterm_over():
  """libtpu would write a page of addresses before the process ends."""
  aot.devices('v5e:2x2')
  this = types.SimpleNamespace(pid=os.getpid())
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
  assert not processes.has_set(this, 'SigCgt', signal.SIGTERM)
