"""Work in other processes, results in the order of the jobs."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import functools
from multiprocessing import connection
import os
import pkgutil
import queue
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

from sae_jax import errors

# Largest number of jobs sent to a process, the one it works on included.
_JOBS_AHEAD = 2
_SECONDS_TO_END = 5


@dataclasses.dataclass(frozen=True)
class Work:
  """What processes are started for.

  Attributes:
    place: 'module:function'; called with `setup` it returns the function that
      is called with each job.
    setup: what pickles.
    name: what a process is called in errors.
    remedy: what the user can do if one dies.
    environment: variables that it has beside ours.
  """

  place: str
  setup: Any
  name: str
  remedy: str
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def function(self) -> Callable[[Any], Any]:
    """The function that is called with each job, in this process."""
    return pkgutil.resolve_name(self.place)(self.setup)


def run(
  work: Work, jobs: Iterable[tuple[Any, Any]], count: int
) -> Iterator[tuple[Any, Any]]:
  """What jobs give.

  Args:
    work: what is done.
    jobs: pairs of what is kept here and of the job, which pickles; a few are
      read ahead.
    count: number of processes, started when there are jobs for them.

  Yields:
    Pairs of what was kept and of the result, in the order of the jobs.

  Raises:
    UserError: if a process dies; also what a job raises.
  """
  waiting = collections.deque()
  with contextlib.ExitStack() as stack:
    workers = []
    for number, (kept, job) in enumerate(jobs):
      if len(workers) < count:
        workers.append(_Worker(work, len(workers) + 1, count))
        stack.callback(workers[-1].close)
      elif len(waiting) == _JOBS_AHEAD * count:
        oldest, worker = waiting.popleft()
        yield oldest, worker.receive()
      # Processes take jobs in turn: so results come in the jobs' order.
      worker = workers[number % count]
      worker.send(job)
      waiting.append((kept, worker))
    for kept, worker in waiting:
      yield kept, worker.receive()


class _Worker:
  """A process that works; it ends when our end of the line is closed.

  The kernel closes the line however this process ends. multiprocessing is not
  used: it would import the main program again, and with it JAX.
  """

  def __init__(self, work: Work, number: int, count: int):
    self._name, self._remedy = f'{work.name} {number} of {count}', work.remedy
    ours, theirs = socket.socketpair()
    with theirs:
      code = (
        f'from sae_jax import processes; processes._serve({theirs.fileno()})'
      )
      path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
      self._process = subprocess.Popen(
        [sys.executable, '-c', code],
        env=os.environ | {'PYTHONPATH': path} | work.environment,
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        # Ctrl-C goes to the whole group of the main process, which says when to
        # end: there it would be a traceback while Python starts.
        process_group=0,
      )
    self._line = connection.Connection(ours.detach())
    self.send(work)

  def send(self, job: Any) -> None:
    try:
      self._line.send(job)
    except OSError as error:
      raise self._died() from error

  def receive(self) -> Any:
    try:
      result, error = self._line.recv()
    except (EOFError, OSError) as error:
      raise self._died() from error
    if error is not None:
      raise error
    return result

  def _died(self) -> errors.UserError:
    self._line.close()
    code = self._end()
    how = f'with exit code {code}'
    if code < 0:
      how = f'by {signal.Signals(-code).name}'
      if -code == signal.SIGKILL:
        how += ', which often means too little memory'
    return errors.UserError(f'{self._name} was ended {how}: {self._remedy}')

  def _end(self) -> int:
    try:
      return self._process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
      self._process.kill()
      return self._process.wait()

  def close(self) -> None:
    self._line.close()
    self._end()


def _serve(descriptor: int) -> None:
  """Works until the other end of the line is closed."""
  line = connection.Connection(descriptor)
  jobs = queue.SimpleQueue()

  def listen():
    try:
      while True:
        jobs.put(line.recv())
    except (EOFError, OSError):
      os._exit(0)

  # A thread receives jobs while others run: otherwise both ends could wait for
  # the other to read. It also ends a long job when the line is closed.
  threading.Thread(target=listen, daemon=True).start()
  function = functools.cache(jobs.get().function)
  while True:
    job = jobs.get()
    try:
      result = function()(job), None
    except Exception as error:
      result = None, error
    try:
      line.send(result)
    except OSError:
      os._exit(0)
