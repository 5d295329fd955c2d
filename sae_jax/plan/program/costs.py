"""What a compiled program does in one run: arithmetic, HBM, links, kernels."""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import re

import numpy as np

from sae_jax.plan.program import exchange, loops, traffic
from sae_jax.plan.program import flops as flops_lib
from sae_jax.plan.program import parts as parts_lib
from sae_jax.plan.program.text import Computation, Instruction, Module, Shape

# They move nothing: names of values, and ends of what has been counted.
_FREE = frozenset(
  (
    'parameter',
    'constant',
    'tuple',
    'get-tuple-element',
    'bitcast',
    'after-all',
    'partition-id',
    'replica-id',
    'opt-barrier',
    'add-dependency',
    'recv',
    'async-update',
  )
)
_FREE_CALLS = frozenset(
  ('AllocateBuffer', 'ConcatBitcast', 'AssumeGatherIndicesInBound', 'Sharding')
)
_KERNEL = 'tpu_custom_call'
# Steps from an instruction of the compiler's own to one of Python's.
_DISTANCE = 6


@dataclasses.dataclass
class Work:
  """What one part does.

  Attributes:
    flops: of matrix products and of what kernels declare.
    mxu_flops: the same, times the passes of products of float32 factors.
    hbm_bytes: read and written.
  """

  flops: float = 0
  mxu_flops: float = 0
  hbm_bytes: float = 0

  def add(self, other: 'Work', times: float = 1) -> None:
    """Adds another's, so many times."""
    for field in dataclasses.fields(self):
      value = getattr(other, field.name) * times
      setattr(self, field.name, getattr(self, field.name) + value)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A Pallas kernel and what its source declares for one call.

  Attributes:
    name: of the kernel.
    part: of the method.
    flops: declared; 0 where nothing is.
    hbm_bytes: declared, else those of its operands and results.
    declared: whether there is a cost_estimate.
  """

  name: str
  part: str
  flops: float
  hbm_bytes: float
  declared: bool


@dataclasses.dataclass(frozen=True)
class Buffer:
  """An array that exists while the program runs.

  Attributes:
    shape: of it.
    opcode: what makes it.
    part: of the method.
  """

  shape: Shape
  opcode: str
  part: str


@dataclasses.dataclass
class Branches:
  """A choice that the program makes when it runs.

  Attributes:
    part: of the method.
    by_dead: whether it is AuxK's, by the number of dead latents.
    chosen: which branch is assumed.
    costs: of one run of each branch.
  """

  part: str
  by_dead: bool
  chosen: int
  costs: list['Costs']


@dataclasses.dataclass
class Costs:
  """Totals of a computation.

  Attributes:
    parts: by name.
    collectives: how often, and bytes that each device puts in.
    kernels: how often.
    endless: one run of each loop whose length depends on data; they are not
      counted, as a loop that repeats what failed mostly has nothing to do.
    branches: choices.
  """

  parts: dict[str, Work] = dataclasses.field(default_factory=dict)
  collectives: dict[exchange.Collective, np.ndarray] = dataclasses.field(
    default_factory=dict
  )
  kernels: dict[Kernel, float] = dataclasses.field(default_factory=dict)
  endless: dict[str, 'Costs'] = dataclasses.field(default_factory=dict)
  branches: list[Branches] = dataclasses.field(default_factory=list)

  def add(self, other: 'Costs', times: float = 1) -> None:
    """Adds another's, so many times."""
    for name, work in other.parts.items():
      self.parts.setdefault(name, Work()).add(work, times)
    for key, counts in other.collectives.items():
      self.collectives[key] = self.collectives.get(key, 0) + times * counts
    for kernel, count in other.kernels.items():
      self.kernels[kernel] = self.kernels.get(kernel, 0) + times * count
    self.endless |= other.endless
    self.branches += other.branches

  @property
  def total(self) -> Work:
    """Of all parts."""
    whole = Work()
    for work in self.parts.values():
      whole.add(work)
    return whole


def costs(module: Module, choose: Callable[[bool, list[Costs]], int]) -> Costs:
  """What one run of a program does.

  Bodies of loops count as often as they run. HBM traffic is that of every
  instruction's operands and results that lie there: rows alone where rows
  alone are read or written, and once even where it takes several passes.

  Args:
    module: the program.
    choose: the branch that is assumed, from whether it is AuxK's choice by
      the number of dead latents, and what each branch does.
  """

  @functools.cache
  def walk(name: str, caller: str) -> Costs:
    computation, found = module.computations[name], Costs()
    for instruction in computation.instructions.values():
      if not _free(instruction):
        part = _part(module, computation, instruction, caller)
        found.add(_one(module, computation, instruction, part, walk, choose))
    return found

  return walk(module.entry.name, parts_lib.REST)


def _free(instruction: Instruction) -> bool:
  return instruction.opcode in _FREE or instruction.opcode.endswith('-done')


def _one(module, computation, instruction, part, walk, choose) -> Costs:
  """Of one instruction, with what it calls."""
  found, opcode = Costs(), instruction.opcode
  if opcode == 'while':
    times = loops.trips(module, computation, instruction)
    body = walk(instruction.called('body')[0], part)
    if times is None:
      found.endless[instruction.name] = body
    else:
      found.add(body, times)
  elif opcode == 'conditional':
    each = [
      walk(name, part)
      for name in instruction.called(
        'branch_computations', 'false_computation', 'true_computation'
      )
    ]
    by_dead = parts_lib.is_auxk_choice(instruction)
    chosen = choose(by_dead, each)
    found.add(each[chosen])
    found.branches.append(Branches(part, by_dead, chosen, each))
  elif _calls(module, instruction):
    for name in _calls(module, instruction):
      found.add(walk(name, part))
  elif opcode == 'custom-call':
    target = instruction.attribute('custom_call_target').strip('"')
    if target == _KERNEL:
      kernel = _kernel(computation, instruction, part)
      found.kernels[kernel] = 1
      found.parts[part] = Work(kernel.flops, kernel.flops, kernel.hbm_bytes)
    elif target not in _FREE_CALLS:
      moved = traffic.moved(module, computation, instruction)
      found.parts[part] = Work(hbm_bytes=moved)
  else:
    work = Work(hbm_bytes=traffic.moved(module, computation, instruction))
    for inner, one in _with_fused(module, computation, instruction):
      product = flops_lib.matmul(inner, one)
      work.flops += product
      work.mxu_flops += product * flops_lib.passes(inner, one)
      between = exchange.read(one, part)
      if between:
        counts = np.array([1, exchange.put_in(inner, one)], float)
        found.collectives[between] = found.collectives.get(between, 0) + counts
    found.parts[part] = work
  return found


def _calls(module: Module, instruction: Instruction) -> tuple[str, ...]:
  """Computations that are run in an instruction's place, on its operands."""
  if instruction.opcode == 'call':
    return instruction.called('to_apply')
  if instruction.opcode.endswith('-start'):
    return instruction.called('calls')
  if instruction.opcode == 'custom-call':
    # Those of a sort or top-k compare two of the values.
    return tuple(
      name
      for name in instruction.called('called_computations')
      if name in module.computations
      and len(module.computations[name].parameters) == len(instruction.operands)
    )
  return ()


def _with_fused(
  module: Module, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
  """An instruction, or those that it is a fusion of."""
  if instruction.opcode != 'fusion':
    yield computation, instruction
    return
  for name in instruction.called('calls'):
    inner = module.computations[name]
    for one in inner.instructions.values():
      yield from _with_fused(module, inner, one)


def _part(module, computation, instruction, caller: str) -> str:
  """The part of an instruction, else of what it is made for or from."""
  if caller == parts_lib.AUXK:
    return caller

  def users(one):
    return computation.users[one.name]

  def operands(one):
    return map(computation.instructions.get, one.operands)

  for follow in (users, operands):
    front, seen = [instruction], set()
    for _ in range(_DISTANCE):
      for one in front:
        for _, made in ((None, one), *_with_fused(module, computation, one)):
          found = parts_lib.part(made)
          if found and made.opcode != 'constant':
            return found
      seen.update(one.name for one in front)
      front = [
        other
        for one in front
        for other in follow(one)
        if other is not None and other.name not in seen
      ]
  return caller


def buffers(module: Module, at_least: int) -> list[Buffer]:
  """The arrays of so many elements that exist while a program runs.

  What exists inside of a fusion alone is in no memory. What the compiler
  copies in pieces it sees as bytes, s8, which are no arrays of their own.

  Args:
    module: the program.
    at_least: elements.

  Returns:
    The results of its instructions, parameters included, largest first.
  """
  found, seen, front = [], set(), [(module.entry.name, parts_lib.REST)]
  while front:
    name, caller = front.pop()
    if name in seen:
      continue
    seen.add(name)
    computation = module.computations[name]
    for instruction in computation.instructions.values():
      if instruction.opcode in ('tuple', 'get-tuple-element', 'bitcast'):
        continue
      part = None
      for shape in instruction.shapes:
        if shape.size >= at_least and shape.dtype != 's8':
          part = part or _part(module, computation, instruction, caller)
          found.append(Buffer(shape, instruction.opcode, part))
      for called in _run(module, instruction):
        front.append((called, part or caller))
  return sorted(set(found), key=lambda b: -b.shape.size)


def _run(module: Module, instruction: Instruction) -> tuple[str, ...]:
  """All computations whose instructions run one by one."""
  return _calls(module, instruction) + instruction.called(
    'body', 'branch_computations', 'true_computation', 'false_computation'
  )


def _kernel(computation, instruction, part) -> Kernel:
  config = instruction.backend_config.get('custom_call_config', {})
  declared = config.get('cost_estimate') or {}
  moved = float(declared.get('bytes_accessed', 0))
  touched = sum(
    shape.hbm_bytes
    for shape in (*computation.operand_shapes(instruction), *instruction.shapes)
  )
  found = re.search(r'([\w.]+)\)*/pallas_call', instruction.attributes)
  return Kernel(
    name=found[1] if found else instruction.name,
    part=part,
    flops=float(declared.get('flops', 0)),
    hbm_bytes=moved or touched,
    declared=bool(declared),
  )
