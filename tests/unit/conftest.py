"""A store and an autoencoder whose every figure can be worked out by hand."""

import pytest


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """The store of `probed`."""
  # Imports JAX, which must find the settings of tests/conftest.py.
  from tests.support import probed

  return probed.write_store(str(tmp_path_factory.mktemp('made') / 'store'))


@pytest.fixture(scope='module')
def trained(data):
  """An autoencoder of its activations."""
  from tests.support import probed

  return probed.make_trained(data)
