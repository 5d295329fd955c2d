"""Which part of the method an instruction of the training step belongs to."""

import re

import jax
from jax.sharding import Mesh

from sae_jax import ops
from sae_jax.ops import scopes
from sae_jax.plan.program.text import Instruction, Module
from sae_jax.training.config import TrainConfig

AUXK = scopes.AUXK
OPTIMIZER = 'Adam, projection, moving average'
REST = 'rest of the step'

# Whatever they call is of these.
_WHOLE = {scopes.AUXK: AUXK, scopes.OPTIMIZER: OPTIMIZER}
# Else the innermost scope decides: forwards, and in the backward pass.
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
# What a step with TopK has, by the implementation of its products. The kernels
# share a backward pass; dense products share the decoder's too.
_OF_TOPK = {
  'gather': {*_ENCODER, *_DECODER, *_BOTH[:1], scopes.WEIGHT_GRADIENTS},
  'dense': {*_ENCODER, *_BOTH},
  'pallas': {*_ENCODER[:1], *_DECODER[:1], *_BOTH},
}


def _path(instruction: Instruction) -> list[str]:
  """The scopes of an instruction and its operation, the outermost first.

  Empty where it is none of Python's: names that the compiler or a parameter
  gives do not start with a jitted function.
  """
  found = re.search(r'op_name="([^";]*)', instruction.attribute('metadata'))
  if not found or not found[1].startswith('jit('):
    return []
  # jax writes a transformation around the next scope inside of it.
  return [
    re.sub(r'^(?:(?:jvp|transpose|vmap)\()+([^()]*)\)+$', r'\1', name)
    for name in found[1].split('/')
  ]


def part(instruction: Instruction) -> str | None:
  """The part of an instruction, None where nothing says where it is from.

  It is that of the innermost `jax.named_scope` with a name of `scopes`, which
  XLA keeps in the instruction's op_name.

  Args:
    instruction: of the compiled step.
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
  """Whether a conditional is that of AuxK, by the number of dead latents."""
  return _path(instruction)[-2:-1] == [scopes.AUXK]


def expected(
  config: TrainConfig, mesh: Mesh, implementation: str | None = None
) -> frozenset[str]:
  """The parts that a training step must have.

  Args:
    config: the run, with d_model set.
    mesh: that the step is compiled for.
    implementation: of the sparse products, see `ops.decode`.
  """
  names = {OPTIMIZER}
  if config.sae.preprocessing != 'none':
    names.add(scopes.PREPROCESSING)
  if config.sae.activation == 'topk':
    most = config.sae.k * max(1, config.objective.multi_topk)
    with jax.set_mesh(mesh):
      name = ops.choose(
        config.sae.n_latents, most, implementation, config.sae.d_model
      )
    names |= _OF_TOPK[name]
    if mesh.shape['latent'] > 1:
      names.add(scopes.EXCHANGE)
    if config.objective.k_aux:
      names.add(AUXK)
  return frozenset(names)


def check(module: Module, names: frozenset[str]) -> None:
  """Raises ValueError where a part of the step is nowhere in its program.

  Args:
    module: the program.
    names: of the parts, as `expected` gives them.
  """
  present = {
    part(instruction)
    for computation in module.computations.values()
    for instruction in computation.instructions.values()
  }
  missing = sorted(names - present)
  if missing:
    raise ValueError(
      f'the compiled step has no instruction of: {", ".join(missing)}. Each '
      'part runs under a jax.named_scope of sae_jax/ops/scopes.py: one of them '
      'is missing in the code of the step'
    )
