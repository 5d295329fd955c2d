"""What the kernels know of the chip that is compiled for."""

from jax.experimental.pallas import tpu as pltpu

from sae_jax.tpu import target
from sae_jax.tpu.chips import CHIPS

# A vector register is SUBLANES x LANES values of 32 bits.
SUBLANES = 8
LANES = 128
# Scalars that are there for all of a kernel's run; SMEM has 1 MiB.
SMEM_BYTES = 2**19
# No chip has less VMEM: what fits it fits everywhere.
_LEAST = 'v4'


def interpret() -> bool:
  """Whether kernels must be interpreted: nothing else than a TPU runs them."""
  return target.platform() != 'tpu'


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
