"""HBM traffic of single instructions of a compiled program."""

from sae_jax.plan.program.text import Computation, Instruction, Module, Shape

_ROWS = ('slice', 'dynamic-slice', 'gather')
_IN_PLACE = ('dynamic-update-slice', 'scatter')


def moved(
  module: Module, computation: Computation, instruction: Instruction
) -> int:
  """Bytes that an instruction reads from HBM and writes to it.

  Where an instruction reads or replaces single rows of an array, only those
  rows count.

  Args:
    module: the program.
    computation: the one that holds the instruction.
    instruction: any instruction that calls at most a fusion.
  """
  operands = [
    computation.operand(instruction, i)
    for i in range(len(instruction.operands))
  ]
  opcode, results = instruction.opcode, list(instruction.shapes)
  if opcode == 'fusion':
    fused = module.computations[instruction.called('calls')[0]]
    read = sum(
      _read(module, fused, parameter, operand)
      for parameter, operand in zip(fused.parameters, operands)
    )
    return read + _written(module, fused, fused.root, results)
  if opcode == 'copy-start':
    # Target, source, and a token to wait on.
    return results[0].hbm_bytes + results[1].hbm_bytes
  if opcode.endswith('-start'):
    # Operands, result, and a token to wait on.
    opcode = opcode.removesuffix('-start')
    results = results[len(operands) : len(operands) + 1] or results
  if opcode == 'send':
    results = []
  read = sum(
    _taken(opcode, index, operand, results)
    for index, operand in enumerate(operands)
    if operand is not None
  )
  return read + _written(module, computation, instruction, results)


def _taken(opcode, index, operand, results) -> int:
  """Bytes of an operand that an instruction reads from HBM."""
  whole = sum(shape.hbm_bytes for shape in operand.shapes)
  if index == 0 and opcode in _ROWS:
    return min(whole, sum(shape.nbytes for shape in results))
  return 0 if index == 0 and opcode in _IN_PLACE else whole


def _read(module, fused, parameter, operand) -> int:
  """Bytes that a fusion reads of one of its operands from HBM."""
  if operand is None:
    return 0
  whole = sum(shape.hbm_bytes for shape in operand.shapes)
  return min(whole, _used(module, fused, parameter, whole)) if whole else 0


def _used(module, fused, value, whole) -> int:
  """Bytes of a value that the instructions of a fusion read."""
  if value.root:
    return whole
  total = 0
  for user in fused.users.get(value.name, ()):
    for index, name in enumerate(user.operands):
      if name != value.name:
        continue
      if user.opcode == 'bitcast':
        total += _used(module, fused, user, whole)
      elif user.opcode == 'fusion':
        inner = module.computations[user.called('calls')[0]]
        total += _used(module, inner, inner.parameters[index], whole)
      elif index == 0 and user.opcode in _ROWS:
        total += sum(shape.nbytes for shape in user.shapes)
      elif index or user.opcode not in _IN_PLACE:
        return whole
  return total


def _written(module, computation, source, results: list[Shape]) -> int:
  """Bytes of a result that are written to HBM: its rows if made in place."""
  if not any(shape.hbm_bytes for shape in results):
    return 0
  if source.opcode == 'bitcast' and len(results) == 1:
    operand = computation.operand(source, 0)
    if operand is not None and operand.opcode != 'parameter':
      return _written(module, computation, operand, results)
  if source.opcode == 'fusion':
    inner = module.computations[source.called('calls')[0]]
    return _written(module, inner, inner.root, results)
  if source.opcode == 'tuple' and len(results) == len(source.operands):
    return sum(
      _written(module, computation, computation.operand(source, i), [shape])
      for i, shape in enumerate(results)
    )
  if source.opcode == 'dynamic-update-slice':
    return computation.operand(source, 1).shapes[0].nbytes
  if source.opcode == 'scatter':
    # The rows that a scatter adds to are read as well.
    updates = computation.operand(source, len(source.operands) - 1)
    return 2 * updates.shapes[0].nbytes
  return sum(shape.hbm_bytes for shape in results)
