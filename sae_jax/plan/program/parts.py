"""The part of the method that an instruction of a step is of."""

import re

from sae_jax import errors
from sae_jax.ops import scopes
from sae_jax.plan.program.text import Instruction, Module

AUXK = scopes.AUXK
OPTIMIZER = 'Adam, projection, moving average'
REST = 'rest of the step'

# Everything inside of these scopes belongs to the part.
_WHOLE = {scopes.AUXK: AUXK, scopes.OPTIMIZER: OPTIMIZER}
# Elsewhere the innermost scope decides: its part forwards, and backwards.
ENCODER = ('encoder and top-k', 'encoder gradients')
DECODER = (scopes.DECODER, 'decoder gradients')
BOTH = (scopes.ENCODER_AND_DECODER, 'gradients')
_PARTS = {
  scopes.PREPROCESSING: (scopes.PREPROCESSING,) * 2,
  scopes.ENCODER: ENCODER,
  scopes.DECODER: DECODER,
  scopes.ENCODER_AND_DECODER: BOTH,
  scopes.WEIGHT_GRADIENTS: (scopes.WEIGHT_GRADIENTS,) * 2,
  scopes.EXCHANGE: (scopes.EXCHANGE,) * 2,
  scopes.CODES: (scopes.CODES,) * 2,
  scopes.PAIRS: (scopes.PAIRS,) * 2,
  scopes.STATISTICS: (scopes.STATISTICS,) * 2,
  scopes.TOP: (scopes.TOP,) * 2,
  scopes.RANDOM: (scopes.RANDOM,) * 2,
  scopes.NEAR: (scopes.NEAR,) * 2,
  scopes.METRICS: (scopes.METRICS,) * 2,
  scopes.COMPONENTS: (scopes.COMPONENTS,) * 2,
}
# What the program does only if data asks for it, by the scope right around.
_CHOICES = frozenset((scopes.AUXK, scopes.METRICS, scopes.COMPONENTS))


def _path(instruction: Instruction) -> list[str]:
  """The scopes of an instruction and its operation, the outermost first.

  Empty for an instruction that comes from no line of Python: the names of the
  compiler and of parameters do not start with a jitted function.
  """
  match = re.search(r'op_name="([^";]*)', instruction.attribute('metadata'))
  if not match or not match[1].startswith('jit('):
    return []
  # jax writes a transformation around the name of the next scope inside it.
  return [
    re.sub(r'^(?:(?:jvp|transpose|vmap)\()+([^()]*)\)+$', r'\1', name)
    for name in match[1].split('/')
  ]


def part(instruction: Instruction) -> str | None:
  """The part of an instruction, or None where its name has no scopes.

  It is the part of the innermost `jax.named_scope` with a name of `scopes`,
  which XLA keeps in the instruction's op_name.

  Args:
    instruction: an instruction of the compiled step.
  """
  path = _path(instruction)
  if not path:
    return None
  for name, whole in _WHOLE.items():
    if name in path:
      return whole
  back = 'transpose(' in instruction.attribute('metadata')
  for name in reversed(path):
    if name in _PARTS:
      return _PARTS[name][back]
  return REST


def choice(instruction: Instruction) -> str:
  """The scope whose choice a conditional is; '' if it is another choice.

  AuxK chooses by the number of dead latents, the pass over a store by what the
  rows of a batch are for.
  """
  around = _path(instruction)[-2:-1]
  return around[0] if around and around[0] in _CHOICES else ''


def check(module: Module, names: frozenset[str]) -> None:
  """Raises DefectError unless each part of the step is in its program.

  Args:
    module: the program.
    names: names of the parts, from `expected` of the step.
  """
  present = {
    part(instruction)
    for computation in module.computations.values()
    for instruction in computation.instructions.values()
  }
  missing = sorted(names - present)
  if missing:
    raise errors.DefectError(
      f'the compiled step has no instruction of: {", ".join(missing)}. Each '
      'part runs under a jax.named_scope of sae_jax/ops/scopes.py: one of them '
      'is missing in the code of the step'
    )
