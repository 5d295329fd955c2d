"""The platform a program is compiled for, not always that it is traced on."""

import jax


def platform() -> str:
  """'cpu', 'tpu' or another: that of the mesh in use, else of this process.

  A mesh of a TPU topology is in use while a program is compiled for pods on a
  machine without one; see `sae_jax.tpu.aot`.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform
