"""The work of one run of a program: arithmetic, HBM, links, kernels."""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import re

import numpy as np

from sae_jax.plan.program import exchange, loops, traffic
from sae_jax.plan.program import flops as flops_lib
from sae_jax.plan.program import parts as parts_lib
from sae_jax.plan.program.text import Computation, Instruction, Module, Shape

# They move nothing: they name values, or end what is counted at its start.
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
# The most steps from an instruction that the compiler added to one that comes
# from Python.
_DISTANCE = 6


@dataclasses.dataclass
class Work:
  """The work of one part of the method.

  Attributes:
    flops: operations of matrix products, and those that kernels declare.
    mxu_flops: the same, with float32 products times the passes they take.
    hbm_bytes: bytes read from HBM and written to it.
  """

  flops: float = 0
  mxu_flops: float = 0
  hbm_bytes: float = 0

  def add(self, other: 'Work', times: float = 1) -> None:
    """Adds other work `times` times."""
    for field in dataclasses.fields(self):
      value = getattr(other, field.name) * times
      setattr(self, field.name, getattr(self, field.name) + value)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A Pallas kernel and the cost of one call.

  Attributes:
    name: the kernel's name.
    part: the part of the method.
    flops: operations by its cost_estimate; 0 without one.
    hbm_bytes: bytes by its cost_estimate, else of operands and results.
    declared: whether its source has a cost_estimate.
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
    shape: the array's shape.
    opcode: the operation that makes it.
    part: the part of the method.
  """

  shape: Shape
  opcode: str
  part: str


@dataclasses.dataclass
class Branches:
  """A choice between branches that the program makes when it runs.

  Attributes:
    part: the part of the method.
    choice: the scope whose choice it is, see `parts.choice`; '' for others.
    chosen: index of the branch that is assumed.
    costs: costs of one run of each branch.
  """

  part: str
  choice: str
  chosen: int
  costs: list['Costs']


@dataclasses.dataclass
class Costs:
  """Totals of a computation.

  Attributes:
    parts: part of the method -> its work.
    collectives: exchange -> [runs, bytes that each device contributes].
    kernels: kernel -> calls.
    endless: loop whose length depends on data -> one run of its body. The
      totals leave these out: a loop that repeats failed tokens seldom runs.
    branches: the choices between branches.
  """

  parts: dict[str, Work] = dataclasses.field(default_factory=dict)
  collectives: dict[exchange.Collective, np.ndarray] = dataclasses.field(
    default_factory=dict
  )
  kernels: dict[Kernel, float] = dataclasses.field(default_factory=dict)
  endless: dict[str, 'Costs'] = dataclasses.field(default_factory=dict)
  branches: list[Branches] = dataclasses.field(default_factory=list)

  def add(self, other: 'Costs', times: float = 1) -> None:
    """Adds other costs `times` times."""
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
    """The work of all parts together."""
    whole = Work()
    for work in self.parts.values():
      whole.add(work)
    return whole


def costs(
  module: Module,
  choose: Callable[[str, list[Costs]], int],
  runs: Callable[[str], float | None] = lambda part: None,
) -> Costs:
  """The costs of one run of a program.

  The body of a loop counts as often as it runs. An instruction's HBM traffic
  is its operands and results in HBM, each once even if it takes several
  passes; where it reads or replaces single rows, only those rows count.

  Args:
    module: the program.
    choose: returns the index of the branch to assume, given whose choice it is
      (`parts.choice`) and the costs of each branch.
    runs: how often a loop of a part is assumed to run whose length depends on
      data; None to leave it out.
  """

  @functools.cache
  def walk(name: str, caller: str) -> Costs:
    computation, total = module.computations[name], Costs()
    for instruction in computation.instructions.values():
      if not _free(instruction):
        part = _part(module, computation, instruction, caller)
        total.add(
          _instruction_costs(
            module, computation, instruction, part, walk, choose, runs
          )
        )
    return total

  return walk(module.entry.name, parts_lib.REST)


def _free(instruction: Instruction) -> bool:
  return instruction.opcode in _FREE or instruction.opcode.endswith('-done')


def _instruction_costs(
  module, computation, instruction, part, walk, choose, runs
) -> Costs:
  """The costs of one instruction and of the computations that it calls."""
  opcode, calls = instruction.opcode, _calls(module, instruction)
  if opcode == 'while':
    return _loop_costs(module, computation, instruction, part, walk, runs)
  if opcode == 'conditional':
    return _branch_costs(instruction, part, walk, choose)
  if calls:
    total = Costs()
    for name in calls:
      total.add(walk(name, part))
    return total
  if opcode == 'custom-call':
    return _custom_call_costs(module, computation, instruction, part)
  return _operation_costs(module, computation, instruction, part)


def _loop_costs(module, computation, instruction, part, walk, runs) -> Costs:
  times = loops.trips(module, computation, instruction)
  times = runs(part) if times is None else times
  body = walk(instruction.called('body')[0], part)
  if times is None:
    return Costs(endless={instruction.name: body})
  total = Costs()
  total.add(body, times)
  return total


def _branch_costs(instruction, part, walk, choose) -> Costs:
  each = [
    walk(name, part)
    for name in instruction.called(
      'branch_computations', 'false_computation', 'true_computation'
    )
  ]
  choice = parts_lib.choice(instruction)
  chosen = choose(choice, each)
  total = Costs()
  total.add(each[chosen])
  total.branches.append(Branches(part, choice, chosen, each))
  return total


def _custom_call_costs(module, computation, instruction, part) -> Costs:
  target = instruction.attribute('custom_call_target').strip('"')
  if target in _FREE_CALLS:
    return Costs()
  if target == _KERNEL:
    kernel = _kernel(computation, instruction, part)
    work = Work(kernel.flops, kernel.flops, kernel.hbm_bytes)
    return Costs(parts={part: work}, kernels={kernel: 1})
  moved = traffic.moved(module, computation, instruction)
  return Costs(parts={part: Work(hbm_bytes=moved)})


def _operation_costs(module, computation, instruction, part) -> Costs:
  """The costs of an instruction, or of a fusion, that calls nothing."""
  work = Work(hbm_bytes=traffic.moved(module, computation, instruction))
  total = Costs(parts={part: work})
  for inner, operation in _with_fused(module, computation, instruction):
    product = flops_lib.matmul(inner, operation)
    work.flops += product
    work.mxu_flops += product * flops_lib.passes(inner, operation)
    collective = exchange.read(operation, part)
    if collective:
      counts = np.array([1, exchange.put_in(inner, operation)], float)
      total.collectives[collective] = (
        total.collectives.get(collective, 0) + counts
      )
  return total


def _calls(module: Module, instruction: Instruction) -> tuple[str, ...]:
  """Computations that run in an instruction's place, on its operands."""
  if instruction.opcode == 'call':
    return instruction.called('to_apply')
  if instruction.opcode.endswith('-start'):
    return instruction.called('calls')
  if instruction.opcode == 'custom-call':
    # The computation that a sort or top-k calls compares two of the values.
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
  """An instruction, or the instructions that a fusion consists of."""
  if instruction.opcode != 'fusion':
    yield computation, instruction
    return
  for name in instruction.called('calls'):
    inner = module.computations[name]
    for fused in inner.instructions.values():
      yield from _with_fused(module, inner, fused)


def _part(module, computation, instruction, caller: str) -> str:
  """The part of an instruction, or of the nearest user or operand with one."""
  if caller == parts_lib.AUXK:
    return caller

  def users(member):
    return computation.users[member.name]

  def operands(member):
    return map(computation.instructions.get, member.operands)

  def own(member):
    fused = _with_fused(module, computation, member)
    for operation in (member, *(operation for _, operation in fused)):
      part = parts_lib.part(operation)
      if part and operation.opcode != 'constant':
        return part
    return None

  for follow in (users, operands):
    front, seen = [instruction], set()
    for _ in range(_DISTANCE):
      for member in front:
        part = own(member)
        if part:
          return part
      seen.update(member.name for member in front)
      front = [
        neighbour
        for member in front
        for neighbour in follow(member)
        if neighbour is not None and neighbour.name not in seen
      ]
  return caller


def buffers(module: Module, at_least: int) -> list[Buffer]:
  """The arrays of a size that exist while a program runs.

  Arrays inside of a fusion are left out, as they are in no memory; and those of
  type s8, which are how the compiler copies pieces of other arrays.

  Args:
    module: the program.
    at_least: the fewest elements of an array.

  Returns:
    The results of its instructions, parameters included, largest first.
  """
  arrays, seen, front = [], set(), [(module.entry.name, parts_lib.REST)]
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
          arrays.append(Buffer(shape, instruction.opcode, part))
      for called in _run(module, instruction):
        front.append((called, part or caller))
  return sorted(set(arrays), key=lambda b: -b.shape.size)


def _run(module: Module, instruction: Instruction) -> tuple[str, ...]:
  """All computations that an instruction runs, those of fusions left out."""
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
  match = re.search(r'([\w.]+)\)*/pallas_call', instruction.attributes)
  return Kernel(
    name=match[1] if match else instruction.name,
    part=part,
    flops=float(declared.get('flops', 0)),
    hbm_bytes=moved or touched,
    declared=bool(declared),
  )
