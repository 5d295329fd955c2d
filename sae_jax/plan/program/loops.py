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
    computation: that holds the loop.
    loop: the instruction.

  Returns:
    How many, or None where that depends on data.
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
  places = [_element(side) for side in sides]
  for side in (0, 1):
    counter, limit = places[side], values[1 - side]
    if counter is None:
      continue
    if limit is None and places[1 - side] is not None:
      limit = first(places[1 - side])
    step, begin = _step(module, body, counter), first(counter)
    if None not in (limit, begin, step) and step:
      direction = test.attribute('direction')
      ends = (limit - begin) + (
        (1 if step > 0 else -1) if direction in ('LE', 'GE') else 0
      )
      return max(0, -(-ends // step))
  return None


def _origin(computation: Computation, name: str) -> Instruction | None:
  """The instruction that a value is made by, past copies of it."""
  found = computation.instructions.get(name)
  while found is not None and found.opcode in _SAME_VALUE:
    found = computation.operand(found, 0)
  return found


def _inside(module: Module, computation: Computation, root: Instruction):
  """A root, or that of the fusion it is, and what finds its operands."""
  root = _origin(computation, root.name)
  if root.opcode != 'fusion':
    return root, lambda name: _origin(computation, name)
  fused = module.computations[root.called('calls')[0]]

  def find(name):
    found = _origin(fused, name)
    if found is not None and found.opcode == 'parameter':
      return _origin(computation, root.operands[int(found.operand_text)])
    return found

  return _origin(fused, fused.root.name), find


def _constant(found: Instruction | None) -> int | None:
  if found is None or found.opcode != 'constant':
    return None
  return int(found.operand_text) if _whole(found.operand_text) else None


def _whole(text: str) -> bool:
  return bool(re.fullmatch(r'-?\d+', text))


def _element(found: Instruction | None) -> int | None:
  """Which element of the loop's tuple a value is."""
  if found is None or found.opcode != 'get-tuple-element':
    return None
  return int(found.attribute('index'))


def _step(module: Module, body: Computation, element: int) -> int | None:
  """What each run adds to an element of the loop's tuple."""
  if body.root.opcode != 'tuple':
    return None
  new = _origin(body, body.root.operands[element])
  if new is None:
    return None
  made, find = _inside(module, body, new)
  if made is None or made.opcode not in ('add', 'subtract'):
    return None
  sides = [find(name) for name in made.operands]
  if element not in map(_element, sides):
    return None
  found = [v for v in map(_constant, sides) if v is not None]
  if len(found) != 1:
    return None
  return found[0] if made.opcode == 'add' else -found[0]
