"""Every stage on a disk, which the same in a bucket must equal."""

import pytest


@pytest.fixture(scope='module')
def on_disk(tmp_path_factory):
  """The text, and the folder of every stage."""
  # Imports JAX, which must find the settings of tests/conftest.py.
  from tests.support import pipeline, toy

  root = tmp_path_factory.mktemp('local')
  texts = toy.write_texts(root)
  pipeline.run(texts, str(root))
  return texts, root
