"""Compiling the training step, and the HBM it takes."""

import dataclasses
import math
import pathlib
import re
import tempfile
from typing import Any
import warnings

import jax
from jax.sharding import Mesh

from sae_jax import mesh as mesh_lib
from sae_jax.training import state as state_lib
from sae_jax.training import step
from sae_jax.training.config import TrainConfig

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
_OUT_OF_MEMORY = re.compile(
  r'\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)'
  r'|Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm'
)


@dataclasses.dataclass(frozen=True)
class Footprint:
  """Bytes of HBM of one device.

  Attributes:
    parameters: of the autoencoder.
    moments: Adam's.
    average: the moving average of the parameters.
    counters: what else the state holds.
    batch: the activations of a step.
    temporaries: what the compiler needs beside; the most at a time. Where the
      program does not fit, it holds all that the compiler said beside these.
    program: its code.
    padding: of arguments, and results that take no argument's place.
  """

  parameters: int
  moments: int
  average: int
  counters: int
  batch: int
  temporaries: int = 0
  program: int = 0
  padding: int = 0

  @property
  def total(self) -> int:
    """All of it."""
    return sum(dataclasses.asdict(self).values())

  @property
  def arguments(self) -> int:
    """What is there before the step and after it."""
    return self.total - self.temporaries - self.program - self.padding


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled training step.

  Attributes:
    text: of the program, as the compiler left it, '' if it left none.
    footprint: what it takes of a device's HBM.
    fits: whether the compiler found room for it.
    implementation: of the sparse products, as it was asked for.
  """

  text: str
  footprint: Footprint
  fits: bool
  implementation: str | None = None


def arguments(config: TrainConfig, mesh: Mesh) -> Footprint:
  """What the state and the batch take of each device, without padding.

  Args:
    config: the run.
    mesh: of the devices.
  """
  state = state_lib.abstract_state(config, mesh)
  names = {
    'parameters': state.sae,
    'moments': state.optimizer.adam,
    'average': state.optimizer.ema,
  }
  found = {name: _bytes(tree) for name, tree in names.items()}
  raw_BD = jax.ShapeDtypeStruct(
    (config.batch_size, config.sae.d_model),
    jax.numpy.bfloat16,
    sharding=mesh_lib.sharding(mesh, 'BD'),
  )
  return Footprint(
    **found,
    counters=_bytes(state) - sum(found.values()),
    batch=_bytes(raw_BD),
  )


def _bytes(tree: Any) -> int:
  """Of one device's shards."""
  return sum(
    math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
    for a in jax.tree.leaves(tree)
  )


def compile_step(
  config: TrainConfig, mesh: Mesh, implementation: str | None = None
) -> Compiled:
  """Compiles the real training step without making an array.

  Args:
    config: the run.
    mesh: of the devices it is compiled for.
    implementation: of the sparse products, see `ops.decode`.

  Returns:
    The program's text and its memory, also where that is too much.

  Raises:
    JaxRuntimeError: if it can't be compiled for another reason.
  """
  held = arguments(config, mesh)
  lowered = step.lowered(config, mesh, implementation)
  with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
    # A program for chips that are not here is stored, but can't be read back.
    warnings.filterwarnings('ignore', 'Error reading persistent compilation')
    try:
      made = lowered.compile(compiler_options={'xla_dump_to': folder})
    except jax.errors.JaxRuntimeError as error:
      needed = _needed(str(error))
      if needed is None:
        raise
      beside = max(0, needed - held.total)
      too_large = dataclasses.replace(held, temporaries=beside)
      return Compiled(_dumped(folder), too_large, False, implementation)
    # as_text can't print programs of which a part runs on SparseCores.
    text = _dumped(folder) or made.as_text()
  found = made.memory_analysis()
  padding = found.argument_size_in_bytes - held.total
  padding += found.output_size_in_bytes - found.alias_size_in_bytes
  whole = dataclasses.replace(
    held,
    temporaries=found.temp_size_in_bytes,
    program=found.generated_code_size_in_bytes,
    padding=padding,
  )
  return Compiled(text, whole, True, implementation)


def _needed(message: str) -> int | None:
  """Bytes that a program needs which the compiler has no room for."""
  found = _OUT_OF_MEMORY.search(message)
  if not found:
    return None
  size, unit = found[1] or found[5], found[2] if found[1] else found[6]
  return int(float(size) * _UNITS[unit])


def _dumped(folder: str) -> str:
  """The program that the compiler wrote into a folder."""
  written = pathlib.Path(folder).glob('*after_optimizations.txt')
  largest = max(written, key=lambda p: p.stat().st_size, default=None)
  return largest.read_text() if largest else ''
