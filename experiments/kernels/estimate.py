"""The cycles that the TPU compiler says of programs that never run.

With a flag of its own, libtpu writes down its static schedule: how many cycles
each operation of a program takes if memory never makes it wait, Pallas kernels
included. It is an estimate, never a measurement. What it can't see through
must be asked for in other ways: a loop inside of a loop is counted too few
times, and one whose length is known at run time alone as once or never; see
`probes`. Some kernels abort the estimate on some chips, and since it
counts a kernel's VMEM twice, one that needs more than half has none.

Every program is compiled in a process of its own, since the flag must be set
before libtpu is loaded, and since an abort ends the process.
"""

from collections.abc import Iterable
import concurrent.futures
import dataclasses
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
import time

from sae_jax.tpu.chips import CHIPS

_PROFILE = '--xla_jf_dump_static_llo_profile_to'
# With all of VMEM a kernel's own, XLA leaves arguments in HBM. It would move
# small ones to VMEM, and the estimate knows no copy from there to SMEM.
_IN_HBM = '--xla_tpu_scoped_vmem_limit_kib'
_TIMEOUT_S = 1200
# What libtpu says where it aborts, most telling first.
_REASONS = (
  r'Static LLO profiling of .*',
  r'(?:Check failed|F\d{4}).*',
  r'\w*(?:Error|EXHAUSTED): .*',
)


@dataclasses.dataclass(frozen=True)
class Job:
  """A program to compile.

  Attributes:
    chip: one of `chips.CHIPS`.
    program: a function of `probes`, or of `xla` if it begins so.
    arguments: of that function, by name.
    estimated: whether cycles are asked for; else the program is compiled as
      it would be for use.
  """

  chip: str
  program: str
  arguments: tuple[tuple[str, int | float | str], ...]
  estimated: bool = True


@dataclasses.dataclass(frozen=True)
class Found:
  """What the compiler says.

  Attributes:
    cycles: of each operation by name; empty if there is no estimate.
    sizes: what the program chose, such as its tiles.
    error: why there is nothing, else empty.
    temporary: bytes of HBM beside arguments and results.
  """

  cycles: dict[str, int]
  sizes: dict[str, float]
  error: str
  temporary: int = 0

  def of(self, name: str = '') -> int:
    """Cycles of the operations whose names begin so."""
    return sum(c for op, c in self.cycles.items() if op.startswith(name))


def job(chip: str, program: str, estimated: bool = True, **arguments) -> Job:
  """A job with its arguments as keywords."""
  return Job(chip, program, tuple(sorted(arguments.items())), estimated)


def run(jobs: Iterable[Job], workers: int = 2, report=None) -> dict[Job, Found]:
  """Compiles each, some at a time.

  Args:
    jobs: programs; the same one is compiled once.
    workers: processes at a time.
    report: is told of each that is done, with its seconds.
  """
  found = {}
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    futures = {
      pool.submit(_in_process, one): one for one in dict.fromkeys(jobs)
    }
    for future in concurrent.futures.as_completed(futures):
      one = futures[future]
      found[one], seconds = future.result()
      if report:
        report(one, found[one], seconds)
  return found


def _in_process(one: Job) -> tuple[Found, float]:
  began = time.monotonic()
  found = _compiled(one)
  if found.error and one.estimated:
    again = _compiled(one, f'{_IN_HBM}={CHIPS[one.chip].vmem_mib * 1024}')
    found = found if again.error else again
  return found, time.monotonic() - began


def _compiled(one: Job, flags: str = '') -> Found:
  with tempfile.TemporaryDirectory() as folder:
    environment = dict(
      os.environ,
      JAX_PLATFORMS='cpu',
      LIBTPU_INIT_ARGS=f'{_PROFILE}={folder} {flags}' if one.estimated else '',
    )
    ran = None
    try:
      ran = subprocess.run(
        [
          sys.executable,
          '-m',
          __spec__.name,
          json.dumps([one.chip, one.program, one.arguments]),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
      )
    except subprocess.TimeoutExpired:
      error = f'not done after {_TIMEOUT_S} s'
    if ran is not None and not ran.returncode:
      sizes, temporary = json.loads(ran.stdout.splitlines()[-1])
      cycles = _cycles(folder)
      missing = one.estimated and not cycles
      error = 'no estimate was written' if missing else ''
      return Found(cycles, sizes, error, temporary)
    return Found({}, {}, _reason(ran.stderr) if ran else error)


def _reason(text: str) -> str:
  for pattern in _REASONS:
    lines = re.findall(pattern, text)
    if lines:
      return lines[-1][:200]
  return text.strip()[-200:] or 'the compiler ended without a word'


def _cycles(folder: str) -> dict[str, int]:
  """From the profiles of all programs that were compiled."""
  found, name = {}, ''
  for path in glob.glob(f'{folder}/*_static_llo_profile.textproto'):
    with open(path, encoding='utf-8') as file:
      for line in file:
        key, _, value = line.strip().partition(': ')
        if key == 'hlo_op_name':
          name = value.strip('"')
        elif key == 'estimated_cycles':
          found[name] = found.get(name, 0) + int(value)
  return found


def _compile(chip, program, arguments):
  """In the process of one program."""
  # Heavy, and of no use to the process that starts others.
  import jax
  from jax.sharding import NamedSharding, PartitionSpec

  from experiments.kernels import probes, xla
  from sae_jax.tpu import aot

  jax.config.update('jax_enable_compilation_cache', False)
  mesh = aot.one_chip(chip)
  with jax.set_mesh(mesh):
    module = xla if program.startswith('xla_') else probes
    probe = getattr(module, program)(**dict(arguments))
    sharding = NamedSharding(mesh, PartitionSpec())
    args = [
      jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
      for shape, dtype in probe.arguments
    ]
    compiled = jax.jit(probe.function).lower(*args).compile()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  print(json.dumps([probe.sizes, temporary]))


if __name__ == '__main__':
  _compile(*json.loads(sys.argv[1]))
