"""A CPU says nothing of TPUs, and a TPU is taken by itself."""

from importlib import metadata, util

import jax
import pytest

from sae_jax.cli import backend

DISK = ('0x1ae0', '0x010802')
NETWORK = ('0x1ae0', '0x020000')
OTHER = ('0x8086', '0xff0000')
CHIP = ('0x1ae0', '0xff0000')


def machine(root, *pci, files=()):
  """A tree of dev/ and sys/ with these PCI devices and device files."""
  for number, (vendor, kind) in enumerate(pci):
    device = root / 'sys/bus/pci/devices' / f'0000:00:{number:02}.0'
    device.mkdir(parents=True)
    (device / 'vendor').write_text(f'{vendor}\n')
    (device / 'class').write_text(f'{kind}\n')
  for name in files:
    (root / 'dev' / name).parent.mkdir(parents=True, exist_ok=True)
    (root / 'dev' / name).touch()
  return str(root)


@pytest.mark.parametrize(
  ('pci', 'files', 'there'),
  [
    ((), (), False),
    ((DISK, NETWORK, OTHER), ('null', 'nvidia0'), False),
    # The driver of virtual machines, and the accelerators of others.
    ((), ('vfio/vfio', 'accel/accel0'), False),
    ((DISK, NETWORK, CHIP), (), True),
    ((), ('accel0', 'accel1'), True),
    ((DISK,), ('vfio/vfio', 'vfio/0'), True),
  ],
)
def test_a_tpu_is_known_by_its_files_or_its_place_on_the_bus(
  tmp_path, pci, files, there
):
  assert backend.has_tpu(machine(tmp_path, *pci, files=files)) is there


@pytest.fixture
def platforms(monkeypatch):
  """What JAX is asked to take, as on a machine with jax and libtpu alone."""
  before = jax.config.jax_platforms
  jax.config.update('jax_platforms', None)
  for name in ('JAX_FORCE_TPU_INIT', 'PJRT_NAMES_AND_LIBRARY_PATHS'):
    monkeypatch.delenv(name, raising=False)
  modules = {'libtpu': True, 'jax_plugins': None}
  monkeypatch.setattr(util, 'find_spec', modules.get)
  monkeypatch.setattr(metadata, 'entry_points', lambda group: ())
  yield modules
  jax.config.update('jax_platforms', before)


def test_the_cpu_is_taken_where_there_is_no_tpu(platforms, tmp_path):
  backend.skip_absent_tpu(machine(tmp_path, DISK, NETWORK))
  assert jax.config.jax_platforms == 'cpu'


def test_jax_looks_for_itself_where_there_is_a_tpu(platforms, tmp_path):
  backend.skip_absent_tpu(machine(tmp_path, DISK, NETWORK, CHIP))
  assert jax.config.jax_platforms is None


@pytest.mark.parametrize(
  'reason', ['no libtpu', 'module', 'entry point', 'library', 'forced']
)
def test_jax_looks_for_itself_where_it_may_find_more(
  platforms, tmp_path, monkeypatch, reason
):
  if reason == 'no libtpu':
    platforms['libtpu'] = None
  elif reason == 'module':
    platforms['jax_plugins'] = True
  elif reason == 'entry point':
    monkeypatch.setattr(metadata, 'entry_points', lambda group: (group,))
  elif reason == 'library':
    monkeypatch.setenv('PJRT_NAMES_AND_LIBRARY_PATHS', 'own:own.so')
  else:
    monkeypatch.setenv('JAX_FORCE_TPU_INIT', '1')
  backend.skip_absent_tpu(machine(tmp_path))
  assert jax.config.jax_platforms is None


@pytest.mark.parametrize('choice', ['', 'tpu', 'cuda,cpu'])
def test_what_the_user_chose_stays(platforms, tmp_path, choice):
  jax.config.update('jax_platforms', choice)
  backend.skip_absent_tpu(machine(tmp_path))
  assert jax.config.jax_platforms == choice
