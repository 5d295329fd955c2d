"""Settings every test shares, made before JAX starts."""

import collections
import os
import pathlib
import tempfile

import pytest

# Eight devices, so that meshes up to 2x4 are real here.
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Programs compiled by one test run are there for the next and for the
# processes that tests start.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  str(pathlib.Path(tempfile.gettempdir()) / 'sae_jax_test_compilation_cache'),
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')
os.environ.setdefault('JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES', 'none')
# Else every call of gcsfs asks a service that is not there; read on import.
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')


def pytest_collection_modifyitems(items):
  """Files that start processes first: no worker is left with one at the end."""
  slow = collections.Counter(
    item.path for item in items if item.get_closest_marker('slow')
  )
  items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  """The URL of a finished store of planted activations."""
  # Imports JAX, which must find the settings above.
  from tests import planted

  url = str(tmp_path_factory.mktemp('planted') / 'store')
  planted.write_store(url)
  return url


@pytest.fixture
def texts(tmp_path):
  """Texts for a toy's harvest."""
  from tests import toy

  return toy.write_texts(tmp_path)


@pytest.fixture(scope='module')
def v5e():
  """Four chips to compile for."""
  from sae_jax.tpu import chips

  return chips.find('v5e:2x2')


@pytest.fixture(scope='module')
def line(v5e):
  """A mesh of them, all along the latents."""
  from sae_jax.plan import meshes

  return meshes.make_mesh(v5e, 1, 4)
