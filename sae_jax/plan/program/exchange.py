"""Exchanges between devices in a compiled program."""

import dataclasses
import math
import re

import numpy as np

from sae_jax.plan.program.text import Computation, Instruction

BETWEEN_SLICES = 'between slices: '
_KINDS = frozenset(
  (
    'all-reduce',
    'all-gather',
    'reduce-scatter',
    'all-to-all',
    'collective-permute',
    'collective-broadcast',
  )
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """A kind of exchange.

  Attributes:
    kind: XLA's name, after BETWEEN_SLICES if it is between slices.
    group: devices that take part in one exchange, as indices in the order of
      the mesh; () for all.
    part: the part of the method.
  """

  kind: str
  group: tuple[int, ...]
  part: str


def read(instruction: Instruction, part: str) -> Collective | None:
  """The exchange that an instruction performs; None if it performs none.

  Args:
    instruction: any instruction.
    part: the part of the method that it belongs to.
  """
  kind = instruction.opcode.removesuffix('-start')
  if kind == 'send':
    # The runtime's transfer from chip to host, and to the other slices.
    match = re.search(
      r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes
    )
    name = match[1].lower().replace('_', '-') if match else 'send'
    return Collective(BETWEEN_SLICES + name, (), part)
  if kind not in _KINDS:
    return None
  if kind == 'collective-permute':
    pairs = instruction.attribute('source_target_pairs')
    match = re.search(r'\{(\d+,\d+)\}', pairs)
    return Collective(kind, _numbers(match[1]) if match else (), part)
  group = _group(instruction.attribute('replica_groups'))
  return Collective(kind, group, part)


def put_in(computation: Computation, instruction: Instruction) -> int:
  """Bytes that each device contributes to an exchange."""
  taken = computation.operand_shapes(instruction)
  if instruction.opcode == 'send':
    # Its other operand is a token.
    taken = taken[:1]
  return sum(shape.nbytes for shape in taken)


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(n) for n in re.findall(r'\d+', text))


def _group(text: str) -> tuple[int, ...]:
  """The devices of the first group, from any of XLA's three notations."""
  listed = re.match(r'\{\{([\d,]+)\}', text)
  if listed:
    return _numbers(listed[1])
  # [groups,members]<=[extents]T(permutation): an iota, transposed.
  iota = re.match(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  if iota:
    ids = np.arange(math.prod(_numbers(iota[2]))).reshape(_numbers(iota[2]))
    ids = ids.transpose(_numbers(iota[3])) if iota[3] else ids
    return tuple(ids.reshape(_numbers(iota[1]))[0].tolist())
  # mesh['a'=2,'b'=4] {'b'}: the devices along some axes of a mesh.
  axes = re.match(r'mesh\[([^\]]*)\] ?\{([^}]*)\}', text)
  if axes:
    sizes = re.findall(r"'(\w+)'=(\d+)", axes[1])
    chosen = re.findall(r"'(\w+)'", axes[2])
    ids = np.arange(math.prod(int(n) for _, n in sizes))
    ids = ids.reshape([int(n) for _, n in sizes])
    at = tuple(slice(None) if name in chosen else 0 for name, _ in sizes)
    return tuple(ids[at].reshape(-1).tolist())
  return ()
