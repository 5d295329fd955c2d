"""Two processes of four devices each, as two hosts of a pod are."""

from concurrent import futures
import os
import pathlib
import socket
import subprocess
import sys
import types

from jax._src import compiler, distributed


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
      'from sae_jax import mesh; from tests.support import processes; '
      f'mesh.start_processes({coordinator!r}, 2, {number}); '
      'processes.keep_compilations(); '
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

  def ended(child):
    try:
      return child.communicate(timeout=timeout)
    finally:
      # The other would wait for one that failed.
      if child.returncode != 0:
        for each in children:
          each.kill()

  # Read together: one whose pipe is full would wait, and the other for it.
  with futures.ThreadPoolExecutor(len(children)) as pool:
    printed, said = zip(*pool.map(ended, children))
  assert not any(child.returncode for child in children), '\n'.join(said)
  return list(printed)


class _Writer:
  """What JAX's compiler knows of a process, which takes it for the first."""

  process_id = 0

  def __getattr__(self, name):
    return getattr(distributed.global_state, name)


def keep_compilations():
  """Makes this process, if it is not the first, write its compilations too.

  JAX lets the first alone write them, for buckets' sake. A second process of
  CPUs never has the first's: it would compile all anew at every run.
  """
  compiler.distributed = types.SimpleNamespace(global_state=_Writer())


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
