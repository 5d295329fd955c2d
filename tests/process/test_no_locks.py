"""A file system without locks: stores and checkpoints are written there too.

A library that the linker loads first refuses locks of the files in one folder,
as a file system does that is mounted without them.
"""

import os
import shutil
import subprocess
import sys

import pytest

_REFUSES = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <unistd.h>

static int inside(int descriptor) {
  const char *folder = getenv("WITHOUT_LOCKS");
  char link[32], path[4096] = "";
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  return readlink(link, path, sizeof path - 1) > 0 &&
         !strncmp(path, folder, strlen(folder));
}

int flock(int descriptor, int kind) {
  int (*plain)(int, int) = dlsym(RTLD_NEXT, "flock");
  errno = ENOSYS;
  return inside(descriptor) ? -1 : plain(descriptor, kind);
}

#define REFUSE(name) \
  int name(int descriptor, int command, ...) { \
    int (*plain)(int, int, ...) = dlsym(RTLD_NEXT, #name); \
    va_list rest; \
    va_start(rest, command); \
    void *value = va_arg(rest, void *); \
    va_end(rest); \
    int locks = command == F_SETLK || command == F_SETLKW || \
                command == F_OFD_SETLK || command == F_OFD_SETLKW; \
    errno = ENOSYS; \
    if (locks && inside(descriptor)) return -1; \
    return plain(descriptor, command, value); \
  }
REFUSE(fcntl)
REFUSE(fcntl64)
"""

_WRITES = """
import sys
from sae_jax import checkpoint, store
from sae_jax.storage import claim, workdir
from tests.support import checkpoints, small

folder = sys.argv[1]
with claim.claim(folder):
  small.write(f'{folder}/store', small.data())
  store.open_store(f'{folder}/store').verify()
  with workdir.hold(f'{folder}/made', 'sae-probe', {}):
    workdir.sign(f'{folder}/made', 'sae-probe', {'a': 1})
  checkpoints.save(f'{folder}/run', checkpoints.contents())
  print(checkpoint.load(f'{folder}/run').step)
"""


def test_what_cannot_be_locked_is_written_with_a_warning(tmp_path):
  compiler = shutil.which('cc')
  if compiler is None:
    pytest.skip('no C compiler, to build what refuses locks')
  source, library = tmp_path / 'refuses.c', tmp_path / 'refuses.so'
  source.write_text(_REFUSES)
  subprocess.run(
    [compiler, '-shared', '-fPIC', '-o', library, source, '-ldl'], check=True
  )
  folder = tmp_path / 'folder'
  folder.mkdir()
  preloaded = {'LD_PRELOAD': str(library), 'WITHOUT_LOCKS': str(folder)}
  child = subprocess.run(
    [sys.executable, '-c', _WRITES, folder],
    env=os.environ | {'JAX_PLATFORMS': 'cpu'} | preloaded,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert child.returncode == 0, child.stderr
  assert child.stdout.split() == ['7']
  (warning,) = [line for line in child.stderr.splitlines() if 'locks' in line]
  assert f'the file system of {folder} has no locks (Function' in warning
