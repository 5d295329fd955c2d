"""Sizes of the chip that kernels are compiled for."""

import jax
from jax.experimental.pallas import tpu as pltpu

from sae_jax.tpu import target
from sae_jax.tpu.chips import CHIPS

# A vector register is SUBLANES x LANES values of 32 bits.
SUBLANES = 8
LANES = 128
# Most bytes of the scalars that stay in SMEM, of 1 MiB, while a kernel runs.
SMEM_BYTES = 2**19
# The first jax that the kernels are compiled with. The compiler of 0.7.2, which
# Colab has, takes no loop that is unrolled in part.
_KERNELS_FROM = (0, 10, 2)
# The chip with the least VMEM: blocks that fit it fit every chip.
_LEAST = 'v4'


def interpret() -> bool:
  """Whether kernels must be interpreted, as on anything but a TPU."""
  return target.platform() != 'tpu'


def takes_kernels() -> bool:
  """Whether kernels may be chosen: on a TPU, with a jax that compiles them."""
  return not interpret() and jax.__version_info__ >= _KERNELS_FROM


def vmem_bytes(interpreted_as: str = _LEAST) -> int:
  """VMEM of a TensorCore of the chip that is compiled for.

  Args:
    interpreted_as: the chip that interpreted kernels are laid out for, a key of
      `tpu.chips.CHIPS`.
  """
  if interpret():
    return CHIPS[interpreted_as].vmem_bytes
  return pltpu.get_tpu_info().vmem_capacity_bytes


def cores() -> int:
  """TensorCores that one kernel runs on: 2 on v4 and v5p."""
  return 1 if interpret() else pltpu.get_tpu_info().num_cores
