"""Cycles of programs by the estimate of the TPU compiler; none of them runs.

A flag of libtpu makes it write its static schedule: how many cycles each
operation of a program takes if memory never makes it wait, Pallas kernels
included. It is an estimate, never a measurement, and loops need care: a loop
inside of a loop is counted too few times, and one whose length is only known at
run time once or never; `probes` gets around both. Some kernels abort the
estimate on some chips, and since it counts a kernel's VMEM twice, a kernel that
needs more than half has none.

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
    estimated: whether to estimate cycles; if not, the program is compiled as
      it would be for use.
  """

  chip: str
  program: str
  arguments: tuple[tuple[str, int | float | str], ...]
  estimated: bool = True


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What the compiler says of a program.

  Attributes:
    cycles: of each operation by name; empty if there is no estimate.
    sizes: sizes that the program chose, such as its tiles.
    error: why there are no cycles; empty if there are.
    temporary: bytes of HBM beside arguments and results.
  """

  cycles: dict[str, int]
  sizes: dict[str, float]
  error: str
  temporary: int = 0

  def of(self, name: str = '') -> int:
    """Cycles of the operations whose names begin with `name`."""
    return sum(c for op, c in self.cycles.items() if op.startswith(name))


def job(chip: str, program: str, estimated: bool = True, **arguments) -> Job:
  """A job with its arguments as keywords."""
  return Job(chip, program, tuple(sorted(arguments.items())), estimated)


def run(
  jobs: Iterable[Job], workers: int = 2, report=None
) -> dict[Job, Estimate]:
  """Compiles each job, `workers` at a time.

  Args:
    jobs: programs; equal ones are compiled once.
    workers: processes at a time.
    report: called with each job that is done, its estimate and its seconds.
  """
  estimates = {}
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    futures = {
      pool.submit(_in_process, job): job for job in dict.fromkeys(jobs)
    }
    for future in concurrent.futures.as_completed(futures):
      job = futures[future]
      estimates[job], seconds = future.result()
      if report:
        report(job, estimates[job], seconds)
  return estimates


def _in_process(job: Job) -> tuple[Estimate, float]:
  began = time.monotonic()
  estimate = _compiled(job)
  if estimate.error and job.estimated:
    again = _compiled(job, f'{_IN_HBM}={CHIPS[job.chip].vmem_mib * 1024}')
    estimate = estimate if again.error else again
  return estimate, time.monotonic() - began


def _compiled(job: Job, flags: str = '') -> Estimate:
  with tempfile.TemporaryDirectory() as folder:
    environment = dict(
      os.environ,
      JAX_PLATFORMS='cpu',
      LIBTPU_INIT_ARGS=f'{_PROFILE}={folder} {flags}' if job.estimated else '',
    )
    process = None
    try:
      process = subprocess.run(
        [
          sys.executable,
          '-m',
          __spec__.name,
          json.dumps([job.chip, job.program, job.arguments]),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
      )
    except subprocess.TimeoutExpired:
      error = f'not done after {_TIMEOUT_S} s'
    if process is not None and not process.returncode:
      sizes, temporary = json.loads(process.stdout.splitlines()[-1])
      cycles = _cycles(folder)
      missing = job.estimated and not cycles
      error = 'no estimate was written' if missing else ''
      return Estimate(cycles, sizes, error, temporary)
    return Estimate({}, {}, _reason(process.stderr) if process else error)


def _reason(text: str) -> str:
  for pattern in _REASONS:
    lines = re.findall(pattern, text)
    if lines:
      return lines[-1][:200]
  return text.strip()[-200:] or 'the compiler ended without a word'


def _cycles(folder: str) -> dict[str, int]:
  """Cycles of each operation, from the profiles of all programs compiled."""
  cycles, name = {}, ''
  for path in glob.glob(f'{folder}/*_static_llo_profile.textproto'):
    with open(path, encoding='utf-8') as file:
      for line in file:
        key, _, value = line.strip().partition(': ')
        if key == 'hlo_op_name':
          name = value.strip('"')
        elif key == 'estimated_cycles':
          cycles[name] = cycles.get(name, 0) + int(value)
  return cycles


def _compile(chip, program, arguments):
  """Compiles one program, in the process of that program."""
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
