"""A CPU says nothing of TPUs, and a TPU is taken by itself."""

from importlib import metadata, util
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from sae_jax.cli import backend
from tests import planted

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


@pytest.mark.fast
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


@pytest.mark.fast
def test_the_cpu_is_taken_where_there_is_no_tpu(platforms, tmp_path):
  backend.skip_absent_tpu(machine(tmp_path, DISK, NETWORK))
  assert jax.config.jax_platforms == 'cpu'


@pytest.mark.fast
def test_jax_looks_for_itself_where_there_is_a_tpu(platforms, tmp_path):
  backend.skip_absent_tpu(machine(tmp_path, DISK, NETWORK, CHIP))
  assert jax.config.jax_platforms is None


@pytest.mark.fast
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


@pytest.mark.fast
@pytest.mark.parametrize('choice', ['', 'tpu', 'cuda,cpu'])
def test_what_the_user_chose_stays(platforms, tmp_path, choice):
  jax.config.update('jax_platforms', choice)
  backend.skip_absent_tpu(machine(tmp_path))
  assert jax.config.jax_platforms == choice


def binary(name, platforms=None, **flags):
  """Runs a binary as in a plain shell, or with JAX_PLATFORMS."""
  environment = dict(os.environ)
  for variable in ('JAX_PLATFORMS', 'XLA_FLAGS', 'TF_CPP_MIN_LOG_LEVEL'):
    environment.pop(variable, None)
  if platforms is not None:
    environment['JAX_PLATFORMS'] = platforms
  return subprocess.run(
    [
      pathlib.Path(sys.executable).parent / name,
      *(f'--{flag}={value}' for flag, value in flags.items()),
    ],
    capture_output=True,
    text=True,
    env=environment,
  )


def of_tpus(text):
  """The lines that speak of TPUs."""
  return [line for line in text.splitlines() if 'tpu' in line.lower()]


@pytest.mark.slow
@pytest.mark.skipif(
  backend.has_tpu() or backend._has_plugin(), reason='there is more than a CPU'
)
def test_a_run_on_a_cpu_says_nothing_of_tpus(tmp_path_factory):
  # A folder whose name is silent too.
  folder = tmp_path_factory.mktemp('quiet')
  store, workdir = str(folder / 'store'), str(folder / 'run')
  planted.write_store(store)
  small = {'n_latents': 64, 'k': 4, 'batch_size': 64, 'steps': 2}
  trained = binary('sae-train', store=store, workdir=workdir, **small)
  assert trained.returncode == 0, trained.stderr
  assert '1 local of 1 cpu devices' in trained.stderr
  assert not of_tpus(trained.stdout + trained.stderr)
  # It reads the checkpoint, on a device, before it looks for the subject.
  probe = {'store': store, 'checkpoint': workdir, 'workdir': str(folder / 'p')}
  probed = binary('sae-probe', **probe)
  assert probed.returncode == 2
  assert "subject 'planted' is not known" in probed.stderr
  assert not of_tpus(probed.stdout + probed.stderr)
  # Control: JAX's own choice starts libtpu, which says so.
  assert of_tpus(binary('sae-probe', '', **probe).stderr)
