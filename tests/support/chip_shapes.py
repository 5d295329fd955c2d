"""Shapes that kernels are compiled for: in CI some, on request all."""

import pytest

from sae_jax.ops import shapes


def named(*names, in_ci=('32k', 'wide')):
  """Parameters for shapes, of all or of these names.

  Those that CI leaves out are marked `chips`: `make test-chips` compiles them.
  """
  return [
    pytest.param(
      shape,
      id=shape.name,
      marks=[] if shape.name in in_ci else pytest.mark.chips,
    )
    for shape in shapes.SHAPES
    if not names or shape.name in names
  ]
