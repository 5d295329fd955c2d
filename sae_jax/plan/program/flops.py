"""Multiplications and additions of single instructions of a program."""

import math
import re

import numpy as np

from sae_jax.plan.program.text import Computation, Instruction, Shape

# Passes of the matrix unit that a product of float32 factors takes.
_PASSES = {'highest': 6, 'high': 3}


def matmul(computation: Computation, instruction: Instruction) -> int:
  """Multiplications and additions of a product, 0 for other instructions.

  A TPU program has its products as convolutions, those with batch dimensions
  as convolutions over a window.

  Args:
    computation: that holds it.
    instruction: any.
  """
  if instruction.opcode == 'dot':
    contracted = _numbers(instruction.attribute('lhs_contracting_dims'))
    left = computation.operand(instruction, 0).shapes[0]
    depth = math.prod(left.dims[i] for i in contracted)
    return 2 * instruction.shapes[0].size * depth
  if instruction.opcode == 'convolution':
    left, right = computation.operand_shapes(instruction)[:2]
    return _convolution(instruction, left, right)
  return 0


def passes(computation: Computation, instruction: Instruction) -> int:
  """How often a product goes through a matrix unit of bfloat16 factors."""
  factors = computation.operand_shapes(instruction)
  wide = any(shape.dtype == 'f32' for shape in factors)
  precision = instruction.attribute('operand_precision')
  counts = [_PASSES.get(p, 1) for p in re.findall(r'\w+', precision)]
  return max(counts, default=1) if wide else 1


def _numbers(text: str) -> list[int]:
  return [int(n) for n in re.findall(r'\d+', text)]


def _convolution(instruction: Instruction, left: Shape, right: Shape) -> int:
  """2 x outputs of each feature x inputs that each output sums."""
  labels = re.match(
    r'(\w+)_(\w+)->(\w+)', instruction.attribute('dim_labels')
  ).groups()
  sizes = [
    dict(zip(names, shape.dims))
    for names, shape in zip(labels, (left, right, instruction.shapes[0]))
  ]
  window = dict(
    re.findall(r'(\w+)=(\S+)', instruction.attribute('window').strip('{}'))
  )
  spatial = sorted(name for name in sizes[2] if name.isdigit())
  outputs = sizes[2]['b'] * sizes[2]['f'] * sizes[1]['i']
  for dim, name in enumerate(spatial):
    outputs *= _positions(
      sizes[0][name], sizes[1][name], sizes[2][name], window, dim
    )
  groups = _numbers(instruction.attribute('batch_group_count')) or [1]
  return 2 * outputs // groups[0]


def _positions(
  inputs: int, kernel: int, outputs: int, window: dict[str, str], dim: int
) -> int:
  """Pairs of output and kernel position that meet an input, not padding."""

  def field(name, default):
    return window[name].split('x')[dim] if name in window else default

  stride, lhs_dilate, rhs_dilate = (
    int(field(name, 1)) for name in ('stride', 'lhs_dilate', 'rhs_dilate')
  )
  low = int(str(field('pad', '0_0')).split('_')[0])
  output_OK = np.arange(outputs)[:, None] * stride
  at_OK = output_OK + np.arange(kernel) * rhs_dilate - low
  met_OK = (at_OK >= 0) & (at_OK <= (inputs - 1) * lhs_dilate)
  return int((met_OK & (at_OK % lhs_dilate == 0)).sum())
