"""Keeps JAX from looking for a TPU that is not there."""

import glob
from importlib import metadata, util
import os
import pathlib

import jax

_GOOGLE = '0x1ae0'
# PCI classes of other devices of Google's virtual machines: disks, networks.
_OTHER_CLASSES = ('0x01', '0x02')


def _is_tpu(device: pathlib.Path) -> bool:
  try:
    return (device / 'vendor').read_text().strip() == _GOOGLE and not (
      device / 'class'
    ).read_text().startswith(_OTHER_CLASSES)
  except OSError:
    return False


def has_tpu(root: str = '/') -> bool:
  """Whether this machine has a TPU, by its device files or on its PCI bus.

  It needs no list of chips, so newer ones count too. In doubt the answer is
  yes, and JAX looks for itself.

  Args:
    root: the folder that holds dev/ and sys/.
  """
  if glob.glob(f'{root}/dev/accel[0-9]*') or glob.glob(
    f'{root}/dev/vfio/[0-9]*'
  ):
    return True
  return any(map(_is_tpu, pathlib.Path(root, 'sys/bus/pci/devices').glob('*')))


def _has_plugin() -> bool:
  """Whether JAX has a plugin for other devices, such as GPUs."""
  return (
    util.find_spec('jax_plugins') is not None
    or bool(metadata.entry_points(group='jax_plugins'))
    or 'PJRT_NAMES_AND_LIBRARY_PATHS' in os.environ
  )


def skip_absent_tpu(root: str = '/') -> None:
  """Makes JAX take the CPU if libtpu is installed but there is no TPU.

  libtpu is `sae-plan`'s compiler. Wherever it is installed JAX tries to start a
  TPU with it, which fails in a page of errors before JAX takes the CPU. Nothing
  changes if the user has chosen (JAX_PLATFORMS, JAX_FORCE_TPU_INIT), if there
  is a TPU, or if JAX has a plugin for other devices. Call it before JAX has its
  devices.

  Args:
    root: see `has_tpu`.
  """
  chosen = jax.config.jax_platforms is not None
  if (
    not chosen
    and 'JAX_FORCE_TPU_INIT' not in os.environ
    and util.find_spec('libtpu') is not None
    and not _has_plugin()
    and not has_tpu(root)
  ):
    jax.config.update('jax_platforms', 'cpu')
