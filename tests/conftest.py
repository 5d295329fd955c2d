"""What every test shares, set before JAX starts; its folder is its mark."""

import importlib.metadata
import os
import pathlib
import shutil
import tempfile

import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Programs compiled by one test run are there for the next and for the
# processes that tests start.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  str(pathlib.Path(tempfile.gettempdir()) / 'sae_jax_test_compilation_cache'),
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
os.environ.setdefault('JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES', 'none')
# Else every call of gcsfs asks a service that is not there; read on import.
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')

# Files are synced before they are named: in memory that takes no time. A run of
# all tests leaves half a GiB there, with programs that tests start.
_MEMORY = pathlib.Path('/dev/shm')
if (
  _MEMORY.is_dir()
  and shutil.disk_usage(_MEMORY).free >= 2**33
  and not os.statvfs(_MEMORY).f_flag & os.ST_NOEXEC
):
  os.environ.setdefault('PYTEST_DEBUG_TEMPROOT', str(_MEMORY))

pytest.register_assert_rewrite('tests.support')

TESTS = pathlib.Path(__file__).parent
# Those whose tests wait longest come first: no worker is left with one.
FOLDERS = (
  'demo', 'process', 'bucket', 'cloud', 'mesh', 'compiler', 'browser', 'unit',
)  # fmt: skip
MESH = TESTS / 'mesh'


def pytest_configure(config):
  """Eight devices where tests of meshes are run, so that 2x4 is real."""
  asked = [pathlib.Path(arg.partition('::')[0]) for arg in config.args]
  asked = [(config.invocation_params.dir / path).resolve() for path in asked]
  flags = [os.environ.get('XLA_FLAGS', '')]
  of_mesh = [path == MESH or MESH in path.parents for path in asked]
  if any(of_mesh) or any(path in MESH.parents for path in asked):
    flags.append('--xla_force_host_platform_device_count=8')
  # XLA's older emitter of loops for the CPU, which chips do not have, compiles
  # in two thirds of the time. A release that does not know the flag ends, as
  # does the TPU compiler, which tests of other folders use.
  if all(of_mesh) and importlib.metadata.version('jaxlib').startswith('0.10.'):
    flags.append('--xla_cpu_use_fusion_emitters=false')
  os.environ['XLA_FLAGS'] = ' '.join(flags).strip()


def pytest_collection_modifyitems(items):
  """Marks each test by its folder, and puts the slow folders first."""
  for item in items:
    item.add_marker(folder(item))
  items.sort(key=lambda item: FOLDERS.index(folder(item)))


def folder(item):
  """The folder of a test, which is its mark."""
  return item.path.relative_to(TESTS).parts[0]


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  """The URL of a finished store of planted activations."""
  # Imports JAX, which must find the settings above.
  from tests.support import planted

  url = str(tmp_path_factory.mktemp('planted') / 'store')
  planted.write_store(url)
  return url


@pytest.fixture
def texts(tmp_path):
  """Texts for a toy's harvest."""
  from tests.support import toy

  return toy.write_texts(tmp_path)
