"""Huge pages for a process that computes on a CPU."""

import os
import platform
import sys

_TUNABLE = 'glibc.malloc.hugetlb'
_MODES = '/sys/kernel/mm/transparent_hugepage/enabled'


def on_request() -> bool:
  """Whether kernel and C library give huge pages to a program that asks."""
  if platform.libc_ver()[0] != 'glibc':
    return False
  try:
    with open(_MODES) as modes:
      return '[madvise]' in modes.read()
  except OSError:
    return False


def use_huge_pages() -> None:
  """Starts this program again with large allocations on huge pages.

  Every step's temporaries are mapped anew, and with pages of 4 KiB that takes a
  third of a training step. glibc asks for huge pages only if its tunable is set
  before the program starts. Does nothing if it is set already, if the C library
  is another, or if the kernel does not give huge pages on request.

  What the program has done by then it does twice: it is for the first line of a
  program of our own, and never for a function that others call.
  """
  tunables = os.environ.get('GLIBC_TUNABLES', '')
  if _TUNABLE in tunables or not on_request():
    return
  both = [part for part in (tunables, f'{_TUNABLE}=1') if part]
  environment = os.environ | {'GLIBC_TUNABLES': ':'.join(both)}
  os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
