"""The part of the method that an instruction of the training step is of."""

import re

import jax
from jax.sharding import Mesh

from sae_jax import errors, ops
from sae_jax.ops import scopes
from sae_jax.plan.program.text import Instruction, Module
from sae_jax.training import objective
from sae_jax.training.config import TrainConfig

AUXK = scopes.AUXK
OPTIMIZER = 'Adam, projection, moving average'
REST = 'rest of the step'

# Everything inside of these scopes belongs to the part.
_WHOLE = {scopes.AUXK: AUXK, scopes.OPTIMIZER: OPTIMIZER}
# Elsewhere the innermost scope decides: its part forwards, and backwards.
_ENCODER = ('encoder and top-k', 'encoder gradients')
_DECODER = (scopes.DECODER, 'decoder gradients')
_BOTH = (scopes.ENCODER_AND_DECODER, 'gradients')
_PARTS = {
  scopes.PREPROCESSING: (scopes.PREPROCESSING,) * 2,
  scopes.ENCODER: _ENCODER,
  scopes.DECODER: _DECODER,
  scopes.ENCODER_AND_DECODER: _BOTH,
  scopes.WEIGHT_GRADIENTS: (scopes.WEIGHT_GRADIENTS,) * 2,
  scopes.EXCHANGE: (scopes.EXCHANGE,) * 2,
}
# Parts of a sparse pass, by the implementation of its products. The kernels
# share a backward pass; dense products share the decoder's too.
_SPARSE = {
  'gather': {*_ENCODER, *_DECODER, *_BOTH[:1], scopes.WEIGHT_GRADIENTS},
  'dense': {*_ENCODER, *_BOTH},
  'pallas': {*_ENCODER[:1], *_DECODER[:1], *_BOTH},
}


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


def is_auxk_choice(instruction: Instruction) -> bool:
  """Whether a conditional is AuxK's choice by the number of dead latents."""
  return _path(instruction)[-2:-1] == [scopes.AUXK]


def expected(
  config: TrainConfig, mesh: Mesh, implementation: str | None = None
) -> frozenset[str]:
  """The parts that a training step must have.

  Args:
    config: the run, with d_model set.
    mesh: the mesh that the step is compiled for.
    implementation: of the sparse products, see `ops.decode`.
  """
  names = {OPTIMIZER}
  if config.sae.preprocessing != 'none':
    names.add(scopes.PREPROCESSING)
  method = objective.of(config.sae.activation)
  if method.SPARSE:
    with jax.set_mesh(mesh):
      name = ops.choose(
        config.sae.n_latents,
        config.objective.widest(config.sae.k),
        implementation,
        config.sae.d_model,
      )
    names |= _SPARSE[name]
    if mesh.shape['latent'] > 1:
      names.add(scopes.EXCHANGE)
  else:
    names |= {*_ENCODER, *_DECODER}
  if method.AUXK and config.objective.k_aux:
    names.add(AUXK)
  return frozenset(names)


def check(module: Module, names: frozenset[str]) -> None:
  """Raises DefectError unless each part of the step is in its program.

  Args:
    module: the program.
    names: names of the parts, from `expected`.
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
