"""What the kernels know of the chip that is compiled for."""

from jax.experimental.pallas import tpu as pltpu

from sae_jax.tpu import target

# The least of any chip (v4), for interpreted kernels.
_LEAST_VMEM = 2**24
# Scalars that are there for all of a kernel's run; SMEM has 1 MiB.
SMEM_BYTES = 2**19


def vmem_bytes() -> int:
  """VMEM of the chip that is compiled for."""
  if target.platform() != 'tpu':
    return _LEAST_VMEM
  return pltpu.get_tpu_info().vmem_capacity_bytes


def cores() -> int:
  """TensorCores that one kernel runs on: 2 on v4 and v5p."""
  return pltpu.get_tpu_info().num_cores if target.platform() == 'tpu' else 1
