"""A stage as a process of its own, from the first line of its `main` on.

What takes seconds to import is imported once signals have been seen to.
"""

from collections.abc import Callable
import importlib
import os
import signal
import sys

from sae_jax.cli import huge_pages

_ENDING = {signal.SIGINT, signal.SIGTERM}


def run(
  stage: str,
  listen: Callable[[], None] | None = None,
  binary: str = '',
) -> None:
  """Runs a stage as the command line says.

  Ctrl-C ends the process at once and silently, as the shell expects it: an
  exception instead, at any moment, is lost or becomes another one where it
  meets what imports or calls back. What is on disk is whole at any moment.

  Args:
    stage: name of a module of `cli.stages`.
    listen: takes over SIGTERM, which otherwise ends the process.
    binary: name of the stage's module of `cli`, if it is another.
  """
  if _is_own(binary or stage):
    # Neither the restart nor what is set up here is interrupted: a signal that
    # comes meanwhile waits, also while the process starts again.
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    huge_pages.use_huge_pages()
    # A shell's background jobs ignore it, and go on to.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
      signal.signal(signal.SIGINT, signal.SIG_DFL)
    if listen is not None:
      listen()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
  flags = importlib.import_module('sae_jax.cli.flags')
  module = importlib.import_module(f'sae_jax.cli.stages.{stage}')
  module.define()
  flags.run(module.work, module.__doc__)


def _is_own(binary: str) -> bool:
  """Whether this process is the console script, or `python -m` of its module.

  A program that calls `main` has signals and memory of its own.
  """
  program = sys.modules['__main__']
  spec = getattr(program, '__spec__', None)
  if spec is not None:
    return spec.name == f'sae_jax.cli.{binary}'
  name = os.path.basename(getattr(program, '__file__', ''))
  return name.partition('.')[0] == f'sae-{binary}'
