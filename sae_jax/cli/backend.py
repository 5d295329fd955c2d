"""Which devices JAX looks for, where it would look for one that isn't there."""

import glob
from importlib import metadata, util
import os
import pathlib

import jax

_GOOGLE = '0x1ae0'
# PCI classes of what Google's virtual machines have else: disks, networks.
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

  A chip that is newer than this code counts: it needs no list of chips. In
  doubt the answer is yes, since JAX then looks for itself.

  Args:
    root: the folder that holds dev/ and sys/.
  """
  if glob.glob(f'{root}/dev/accel[0-9]*') or glob.glob(
    f'{root}/dev/vfio/[0-9]*'
  ):
    return True
  return any(map(_is_tpu, pathlib.Path(root, 'sys/bus/pci/devices').glob('*')))


def _has_plugin() -> bool:
  """Whether JAX has a plugin, as those for GPUs are."""
  return (
    util.find_spec('jax_plugins') is not None
    or bool(metadata.entry_points(group='jax_plugins'))
    or 'PJRT_NAMES_AND_LIBRARY_PATHS' in os.environ
  )


def skip_absent_tpu(root: str = '/') -> None:
  """Has JAX take the CPU where libtpu is installed and no TPU is there.

  libtpu is `sae-plan`'s compiler, and JAX starts it as a TPU wherever it is
  installed: that fails in a page of errors, and then JAX takes the CPU. The
  choice stays JAX's where the user has made one (JAX_PLATFORMS,
  JAX_FORCE_TPU_INIT), where a TPU is there, and where there is a plugin for
  other devices. To be called before JAX has its devices.

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
