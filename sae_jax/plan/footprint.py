"""Compiles a step and reads how much HBM it takes."""

from collections.abc import Mapping
import dataclasses
import math
import pathlib
import re
import tempfile
from typing import Any
import warnings

import jax
from jax.sharding import Mesh

from sae_jax.plan import steps

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
_OUT_OF_MEMORY = re.compile(
  r'\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)'
  r'|Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm'
)


@dataclasses.dataclass(frozen=True)
class Footprint:
  """Bytes of HBM that a step takes on one device.

  Attributes:
    arguments: what is in memory before a step and after it, by name.
    temporaries: the compiler's temporary arrays, at their peak. Where the
      program does not fit, everything beyond the arguments.
    program: the program's code.
    padding: padding of the arguments, and results that do not reuse the memory
      of an argument.
  """

  arguments: Mapping[str, int]
  temporaries: int = 0
  program: int = 0
  padding: int = 0

  @property
  def parts(self) -> dict[str, int]:
    """Bytes of all by name, the arguments first."""
    others = ('temporaries', 'program', 'padding')
    return {
      **self.arguments,
      **{name: getattr(self, name) for name in others},
    }

  @property
  def total(self) -> int:
    """The sum of all parts."""
    return sum(self.parts.values())

  @property
  def held(self) -> int:
    """The sum of the arguments."""
    return sum(self.arguments.values())


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled step.

  Attributes:
    text: the optimised program; '' if the compiler wrote none.
    footprint: the HBM that it takes on a device.
    fits: whether the compiler found room for it.
    implementation: the requested one of the sparse products, None for the
      one that training chooses.
  """

  text: str
  footprint: Footprint
  fits: bool
  implementation: str | None = None


def arguments(config: Any, mesh: Mesh) -> Footprint:
  """Bytes of a step's arguments on each device, without padding.

  Args:
    config: of a program, see `steps`.
    mesh: the mesh of devices.
  """
  trees = steps.of(config).arguments(config, mesh)
  return Footprint({name: _bytes(tree) for name, tree in trees.items()})


def _bytes(tree: Any) -> int:
  """Bytes of the shards of all arrays that one device holds."""
  return sum(
    math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
    for a in jax.tree.leaves(tree)
  )


def compile_step(
  config: Any, mesh: Mesh, implementation: str | None = None
) -> Compiled:
  """Compiles the real step of a program without making an array.

  Args:
    config: of the program, see `steps`.
    mesh: the devices it is compiled for.
    implementation: of the sparse products, see `ops.decode`.

  Returns:
    The program's text and its memory, even if it needs more HBM than there is.

  Raises:
    JaxRuntimeError: if it can't be compiled for a reason other than memory.
  """
  held = arguments(config, mesh)
  lowered = steps.of(config).lowered(config, mesh, implementation)
  with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
    # A program for absent chips is cached, but can't be read back.
    warnings.filterwarnings('ignore', 'Error reading persistent compilation')
    try:
      executable = lowered.compile(compiler_options={'xla_dump_to': folder})
    except jax.errors.JaxRuntimeError as error:
      needed = _needed_bytes(str(error))
      if needed is None:
        raise
      too_large = dataclasses.replace(
        held, temporaries=max(0, needed - held.total)
      )
      return Compiled(_dumped(folder), too_large, False, implementation)
    # as_text can't print a program that runs in part on SparseCores.
    text = _dumped(folder) or executable.as_text()
  memory = executable.memory_analysis()
  padding = memory.argument_size_in_bytes - held.total
  padding += memory.output_size_in_bytes - memory.alias_size_in_bytes
  whole = dataclasses.replace(
    held,
    temporaries=memory.temp_size_in_bytes,
    program=memory.generated_code_size_in_bytes,
    padding=padding,
  )
  return Compiled(text, whole, True, implementation)


def _needed_bytes(message: str) -> int | None:
  """Bytes that a program needs, from the compiler's out-of-memory message.

  None for any other message.
  """
  match = _OUT_OF_MEMORY.search(message)
  if not match:
    return None
  size, unit = match[1] or match[5], match[2] if match[1] else match[6]
  return int(float(size) * _UNITS[unit])


def _dumped(folder: str) -> str:
  """The optimised program that the compiler wrote into a folder, or ''."""
  dumps = pathlib.Path(folder).glob('*after_optimizations.txt')
  largest = max(dumps, key=lambda p: p.stat().st_size, default=None)
  return largest.read_text() if largest else ''
