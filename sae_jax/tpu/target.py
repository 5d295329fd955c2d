"""What a program is compiled for, which need not be where it is traced."""

import jax


def platform() -> str:
  """'cpu', 'tpu' or another: that of the mesh in use, else of this process.

  A mesh of a TPU topology is in use while a program is compiled for pods on a
  machine without one; see `sae_jax.aot`.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform
