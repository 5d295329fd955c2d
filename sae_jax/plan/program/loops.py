"""How often the body of a loop of a compiled program runs."""

import re

from sae_jax.plan.program.text import Computation, Instruction, Module

_SAME_VALUE = frozenset(
  ('bitcast', 'copy', 'copy-done', 'copy-start', 'convert', 'reshape')
)


def trips(
  module: Module, computation: Computation, loop: Instruction
) -> int | None:
  """Runs of a `while` that counts from a constant to a constant.

  Args:
    module: the program.
    computation: the one that holds the loop.
    loop: the instruction.

  Returns:
    The number of runs, or None where it depends on data.
  """
  known = re.search(r'known_trip_count.{1,12}?n\W+(\d+)', loop.attributes)
  if known:
    return int(known[1])
  condition = module.computations[loop.called('condition')[0]]
  body = module.computations[loop.called('body')[0]]
  test, find = _inside(module, condition, condition.root)
  if test.opcode != 'compare':
    return None
  sides = [find(name) for name in test.operands[:2]]
  start = computation.operand(loop, 0)

  def first(index):
    if start.opcode != 'tuple' or index >= len(start.operands):
      return None
    return _constant(_origin(computation, start.operands[index]))

  values = [_constant(side) for side in sides]
  elements = [_element(side) for side in sides]
  for side in (0, 1):
    counter, limit = elements[side], values[1 - side]
    if counter is None:
      continue
    if limit is None and elements[1 - side] is not None:
      limit = first(elements[1 - side])
    step, begin = _step(module, body, counter), first(counter)
    if None not in (limit, begin, step) and step:
      direction = test.attribute('direction')
      ends = (limit - begin) + (
        (1 if step > 0 else -1) if direction in ('LE', 'GE') else 0
      )
      return max(0, -(-ends // step))
  return None


def _origin(computation: Computation, name: str) -> Instruction | None:
  """The instruction that makes a value; copies of it are skipped."""
  origin = computation.instructions.get(name)
  while origin is not None and origin.opcode in _SAME_VALUE:
    origin = computation.operand(origin, 0)
  return origin


def _inside(module: Module, computation: Computation, root: Instruction):
  """The instruction that computes a root, and a function that finds operands.

  Where the root is a fusion, that is the root inside of the fusion. The
  function takes an operand's name and returns the instruction that makes it.
  """
  root = _origin(computation, root.name)
  if root.opcode != 'fusion':
    return root, lambda name: _origin(computation, name)
  fused = module.computations[root.called('calls')[0]]

  def find(name):
    origin = _origin(fused, name)
    if origin is not None and origin.opcode == 'parameter':
      return _origin(computation, root.operands[int(origin.operand_text)])
    return origin

  return _origin(fused, fused.root.name), find


def _constant(value: Instruction | None) -> int | None:
  if value is None or value.opcode != 'constant':
    return None
  text = value.operand_text
  return int(text) if re.fullmatch(r'-?\d+', text) else None


def _element(value: Instruction | None) -> int | None:
  """The index of the loop's tuple that a value is taken from, or None."""
  if value is None or value.opcode != 'get-tuple-element':
    return None
  return int(value.attribute('index'))


def _step(module: Module, body: Computation, element: int) -> int | None:
  """The constant that each run adds to an element of the loop's tuple."""
  if body.root.opcode != 'tuple':
    return None
  new = _origin(body, body.root.operands[element])
  if new is None:
    return None
  update, find = _inside(module, body, new)
  if update is None or update.opcode not in ('add', 'subtract'):
    return None
  sides = [find(name) for name in update.operands]
  if element not in map(_element, sides):
    return None
  constants = [v for v in map(_constant, sides) if v is not None]
  if len(constants) != 1:
    return None
  return constants[0] if update.opcode == 'add' else -constants[0]
