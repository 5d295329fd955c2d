"""What a process that reads a checkpoint imports."""

import subprocess
import sys

from tests.support import checkpoints, processes

# What reading a checkpoint has no use for.
UNUSED = (
  'jax.experimental.pallas',
  'optax',
  'sae_jax.ops',
  'sae_jax.training',
  'tensorboardX',
)
REPORT = f'; print(*[n for n in {UNUSED} if n in sys.modules])'


def imported(code, *args):
  """Which of UNUSED a process has imported after it ran code."""
  ended = subprocess.run(
    [sys.executable, '-c', 'import sys; ' + code + REPORT, *args],
    env=processes.environment(devices=1),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert ended.returncode == 0, ended.stderr
  return ended.stdout.split()


def test_loading_imports_neither_training_nor_kernels(tmp_path):
  checkpoints.save(str(tmp_path), checkpoints.contents())
  load = 'from sae_jax import checkpoint; checkpoint.load(sys.argv[1])'
  assert imported(load, str(tmp_path)) == []
  # Control: the process that trains has all of them.
  assert imported('from sae_jax.training import train') == list(UNUSED)
