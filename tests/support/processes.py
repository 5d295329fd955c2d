"""Two processes of four devices each, as two hosts of a pod are."""

import os
import pathlib
import socket
import subprocess
import sys


def free_port():
  """A port of this machine that nobody listens on."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


def environment(devices=4):
  """The environment of a child with so many devices."""
  # Of a flag that is given twice the last is taken.
  flags = [
    os.environ.get('XLA_FLAGS', ''),
    f'--xla_force_host_platform_device_count={devices}',
  ]
  return os.environ | {
    'TF_CPP_MIN_LOG_LEVEL': '3',
    'XLA_FLAGS': ' '.join(flags).strip(),
  }


def run_two(code, arguments, timeout=240):
  """Runs Python code in two joined processes; returns what each printed.

  Args:
    code: run after the processes have joined; sys.argv[1] is its argument.
    arguments: one for each process.
    timeout: seconds.
  """
  coordinator = f'127.0.0.1:{free_port()}'
  children = []
  for number, argument in enumerate(arguments):
    join = (
      'from sae_jax import mesh; '
      f'mesh.start_processes({coordinator!r}, 2, {number}); '
    )
    children.append(
      subprocess.Popen(
        [sys.executable, '-c', join + code, str(argument)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  printed = []
  for child in children:
    out, said = child.communicate(timeout=timeout)
    assert child.returncode == 0, said
    printed.append(out)
  return printed


def children():
  """Ids of the processes that this one has started and not waited for."""
  task = pathlib.Path(f'/proc/{os.getpid()}/task')
  return {
    int(child)
    for thread in task.iterdir()
    for child in (thread / 'children').read_text().split()
  }


def has_set(process, kind, number):
  """Whether a process's main thread has a signal set.

  Args:
    process: the process, which is not waited for.
    kind: a line of its status: 'SigBlk' of blocked signals, 'SigCgt' of those
      with a handler.
    number: the signal.
  """
  status = pathlib.Path(f'/proc/{process.pid}/status').read_text()
  bits = int(status.partition(f'{kind}:')[2].split()[0], 16)
  return bool(bits >> number - 1 & 1)
