"""The platform a program is compiled for, not always that it is traced on."""

import jax


def platform() -> str:
  """'cpu', 'tpu' or another: that of the mesh in use, else of this process.

  A mesh of a TPU topology is in use while a program is compiled for pods on a
  machine without one; see `sae_jax.tpu.aot`.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None:
    return jax.default_backend()
  if not hasattr(device, 'platform'):
    # That of jax 0.7.2 has its kind alone: 'cpu', 'TPU v5 lite'.
    kind = device.device_kind.partition(' ')[0].lower()
    return kind if kind in ('cpu', 'tpu') else jax.default_backend()
  return device.platform
