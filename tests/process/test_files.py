"""A claim dies with the process that made it."""

import signal
import subprocess
import sys

import pytest

from sae_jax import errors
from sae_jax.storage import claim


def test_a_claim_dies_with_its_process(tmp_path):
  code = (
    'import sys, time; from sae_jax.storage import claim\n'
    'with claim.claim(sys.argv[1]):\n'
    '  print("claimed", flush=True); time.sleep(600)'
  )
  holder = subprocess.Popen(
    [sys.executable, '-c', code, tmp_path], stdout=subprocess.PIPE, text=True
  )
  try:
    assert holder.stdout.readline() == 'claimed\n'
    with (
      pytest.raises(errors.UserError, match='in use'),
      claim.claim(str(tmp_path)),
    ):
      pass
  finally:
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
  with claim.claim(str(tmp_path)):
    pass
