"""Which part of the method an instruction of the training step belongs to."""

import re

from sae_jax.plan.hlo import Instruction, Module

AUXK = 'AuxK'
OPTIMIZER = 'Adam, projection, moving average'
EXCHANGE = 'top-k over shards'
REST = 'rest of the step'

# The innermost line of Python that matches one of them decides: by a part of
# its file's path and a pattern of its function's name. The backward pass has
# the line that its forward pass was called from.
_FOLDERS = (
  ('/sparse/top_k/', r'global_top_k|winners', EXCHANGE, EXCHANGE),
  ('/sparse/encode_topk/', '', 'encoder and top-k', 'encoder gradients'),
  ('/sparse/decode/', '', 'decoder', 'decoder gradients'),
  ('/sparse/weight_grad/', '', 'weight gradients', 'weight gradients'),
  ('/sparse/autoencode/', '', 'encoder and decoder', 'gradients'),
  ('/autoencoder.py', 'preprocess', 'preprocessing', 'preprocessing'),
)
_MODULES = (('/auxk.py', AUXK), ('/optimizer.py', OPTIMIZER))


def part(module: Module, instruction: Instruction) -> str | None:
  """The part of an instruction, None where nothing says where it is from.

  Args:
    module: that holds it.
    instruction: any of its instructions.
  """
  stack = module.stack(instruction)
  if not stack:
    return None
  for file, name in _MODULES:
    if any(frame.file.endswith(file) for frame in stack):
      return name
  back = 'transpose(' in instruction.attribute('metadata')
  for frame in stack:
    for folder, function, forward, backward in _FOLDERS:
      if folder in frame.file and re.search(function, frame.function):
        return backward if back else forward
  return REST


def is_auxk_choice(module: Module, instruction: Instruction) -> bool:
  """Whether a conditional is that of AuxK, by the number of dead latents."""
  stack = module.stack(instruction)
  return bool(stack) and stack[0].file.endswith('/auxk.py')
