"""HBM traffic of single instructions of a compiled program."""

from sae_jax.plan.program.text import Computation, Instruction, Module, Shape

_ROWS = ('slice', 'dynamic-slice', 'gather')
_IN_PLACE = ('dynamic-update-slice', 'scatter')


def moved(
  module: Module, computation: Computation, instruction: Instruction
) -> int:
  """Bytes that an instruction reads from HBM and writes to it.

  Rows alone where rows alone are read, or written in place.

  Args:
    module: the program.
    computation: that holds the instruction.
    instruction: any that calls nothing but a fusion.
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
    # To, from, and what is waited on.
    return results[0].hbm_bytes + results[1].hbm_bytes
  if opcode.endswith('-start'):
    # Operands, result, and what is waited on.
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
  """Bytes of a fusion's operand that it reads from HBM."""
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


def _written(module, computation, made, results: list[Shape]) -> int:
  """Bytes that a result writes to HBM: rows alone if it is made in place."""
  if not any(shape.hbm_bytes for shape in results):
    return 0
  if made.opcode == 'bitcast' and len(results) == 1:
    source = computation.operand(made, 0)
    if source is not None and source.opcode != 'parameter':
      return _written(module, computation, source, results)
  if made.opcode == 'fusion':
    inner = module.computations[made.called('calls')[0]]
    return _written(module, inner, inner.root, results)
  if made.opcode == 'tuple' and len(results) == len(made.operands):
    return sum(
      _written(module, computation, computation.operand(made, i), [shape])
      for i, shape in enumerate(results)
    )
  if made.opcode == 'dynamic-update-slice':
    return computation.operand(made, 1).shapes[0].nbytes
  if made.opcode == 'scatter':
    # Rows that are added to are read as well.
    updates = computation.operand(made, len(made.operands) - 1)
    return 2 * updates.shapes[0].nbytes
  return sum(shape.hbm_bytes for shape in results)
