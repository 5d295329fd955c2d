"""The text of a compiled XLA program as computations and instructions."""

import dataclasses
import functools
import json
import math
import re
from typing import Any

_BITS = {'pred': 8, 'token': 0, 'opaque': 0}


@dataclasses.dataclass(frozen=True)
class Shape:
  """The shape of an array of a program, and its memory layout.

  Attributes:
    dtype: XLA's name of the type.
    dims: extents.
    order: dimensions from the fastest one to the slowest.
    tile: extents that the fastest dimensions are padded to, slowest first.
    space: memory space: 0 is HBM, 1 VMEM; all others are on the chip too.
  """

  dtype: str
  dims: tuple[int, ...]
  order: tuple[int, ...] = ()
  tile: tuple[int, ...] = ()
  space: int = 0

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.dims)

  @property
  def nbytes(self) -> int:
    """Bytes in memory, including the padding of tiles."""
    dims = list(self.dims)
    for dim, tile in zip(self.order, reversed(self.tile)):
      dims[dim] = -(-dims[dim] // tile) * tile
    return math.prod(dims) * _bits(self.dtype) // 8

  @property
  def hbm_bytes(self) -> int:
    """Bytes if it lies in HBM, else 0."""
    return 0 if self.space else self.nbytes

  def __str__(self) -> str:
    return f'{self.dtype}[{",".join(map(str, self.dims))}]'


def _bits(dtype: str) -> int:
  if dtype in _BITS:
    return _BITS[dtype]
  # The number in a complex type's name counts both of its floats.
  match = re.search(r'\d+', dtype)
  return int(match[0]) if match else 0


_SHAPE = re.compile(r'([a-z]\w*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?')


def shapes(text: str) -> tuple[Shape, ...]:
  """The array shapes in a text, those of a tuple in order."""
  return tuple(_shape(*groups) for groups in _SHAPE.findall(text))


def _shape(dtype: str, dims: str, layout: str) -> Shape:
  order, _, rest = layout.partition(':')
  tile = re.search(r'T\(([\d,]+)\)', rest)
  space = re.search(r'S\((\d+)\)', rest)
  return Shape(
    dtype,
    tuple(map(int, re.findall(r'\d+', dims))),
    tuple(map(int, re.findall(r'\d+', order))),
    tuple(map(int, tile[1].split(','))) if tile else (),
    int(space[1]) if space else 0,
  )


@dataclasses.dataclass(eq=False)
class Instruction:
  """One instruction.

  Attributes:
    name: unique in its computation.
    opcode: XLA's name of the operation.
    shape_text: the shape of its result.
    operand_text: the text between its parentheses.
    attributes: the text after its parentheses.
    root: whether its result is the computation's result.
  """

  name: str
  opcode: str
  shape_text: str
  operand_text: str
  attributes: str
  root: bool = False

  @functools.cached_property
  def shapes(self) -> tuple[Shape, ...]:
    """The shapes of the arrays in its result."""
    return shapes(self.shape_text)

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    """Names of the instructions that it takes."""
    if self.opcode in ('constant', 'parameter'):
      return ()
    return tuple(re.findall(r'%([\w.\-]+)', self.operand_text))

  def attribute(self, name: str) -> str:
    """The text of an attribute's value; '' if it has no such attribute."""
    match = re.search(rf'(?:^|[ ,]){name}=', self.attributes)
    if not match:
      return ''
    return _balanced(self.attributes, match.end(), ',')

  def called(self, *names: str) -> tuple[str, ...]:
    """Computations that the attributes of these names call."""
    return tuple(
      called
      for name in names
      for called in re.findall(r'%?([\w.\-]+)', self.attribute(name))
    )

  @functools.cached_property
  def backend_config(self) -> dict[str, Any]:
    """The backend's JSON object beside the instruction, {} without one."""
    try:
      config = json.loads(self.attribute('backend_config') or '{}')
    except json.JSONDecodeError:
      return {}
    return config if isinstance(config, dict) else {}


def _balanced(text: str, start: int, stop: str) -> str:
  """The text from start to the first stop that is not inside brackets."""
  depth, quoted, i = 0, False, start
  while i < len(text):
    letter = text[i]
    if quoted:
      # A quoted text may be long, as a kernel's body is.
      i = min(_or_end(text, '"', i), _or_end(text, '\\', i))
      quoted = i < len(text) and text[i] == '\\'
      i += 2 if quoted else 1
      continue
    if letter == '"':
      quoted = True
    elif letter in '([{':
      depth += 1
    elif letter in ')]}' and depth:
      depth -= 1
    elif depth == 0 and letter == stop:
      break
    i += 1
  return text[start:i]


def _or_end(text: str, letter: str, start: int) -> int:
  place = text.find(letter, start)
  return len(text) if place < 0 else place


@dataclasses.dataclass(eq=False)
class Computation:
  """Named instructions, in the order of their execution."""

  name: str
  instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def root(self) -> Instruction:
    """The instruction whose result is the computation's."""
    roots = [i for i in self.instructions.values() if i.root]
    return roots[0] if roots else list(self.instructions.values())[-1]

  @functools.cached_property
  def parameters(self) -> tuple[Instruction, ...]:
    """Its parameters, in the order of the arguments."""
    own = [i for i in self.instructions.values() if i.opcode == 'parameter']
    return tuple(sorted(own, key=lambda i: int(i.operand_text)))

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """Name of an instruction -> the instructions that it is an operand of."""
    users = {name: [] for name in self.instructions}
    for instruction in self.instructions.values():
      for name in set(instruction.operands):
        users.setdefault(name, []).append(instruction)
    return users

  def operand(self, instruction: Instruction, index: int) -> Instruction | None:
    """An instruction's operand by index; None if it has none there."""
    if index >= len(instruction.operands):
      return None
    return self.instructions.get(instruction.operands[index])

  def operand_shapes(self, instruction: Instruction) -> list[Shape]:
    """The shapes of the arrays that an instruction takes."""
    operands = []
    for name in instruction.operands:
      if name in self.instructions:
        operands += self.instructions[name].shapes
    return operands


@dataclasses.dataclass(eq=False)
class Module:
  """A compiled program.

  Attributes:
    computations: name -> computation.
    entry: the computation that a run of the program starts.
  """

  computations: dict[str, Computation]
  entry: Computation


_HEAD = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{\s*$')
_LINE = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = ')


def parse(text: str) -> Module:
  """Reads a module from the text that XLA prints.

  Args:
    text: from `jax.stages.Compiled.as_text` or a dump of the compiler.

  Raises:
    ValueError: if there is no program in the text.
  """
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if current is None:
      head = _HEAD.match(line)
      if head:
        current = computations[head[2]] = Computation(head[2])
        entry = current if head[1] else entry
    elif line.startswith('}'):
      current = None
    else:
      read = _instruction(line)
      if read:
        current.instructions[read.name] = read
  if entry is None:
    raise ValueError('there is no program in this text')
  return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
  start = _LINE.match(line)
  if not start:
    return None
  if line[start.end()] == '(':
    end = start.end() + 1
    shape = '(' + _balanced(line, end, ')') + ')'
  else:
    shape = line[start.end() :].split(' ', 1)[0]
  at = start.end() + len(shape) + 1
  opcode = re.match(r'[\w\-]+', line[at:])
  if not opcode:
    return None
  at += opcode.end() + 1
  operands = _balanced(line, at, ')')
  return Instruction(
    name=start[2],
    opcode=opcode[0],
    shape_text=shape,
    operand_text=operands,
    attributes=line[at + len(operands) + 1 :],
    root=bool(start[1]),
  )
