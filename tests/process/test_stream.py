"""A stream whose text other processes tokenize."""

import jax
import pytest

from sae_jax import mesh
from sae_jax.feed import from_text
from tests.support import runs, streams, toy


@pytest.fixture
def opened(texts, tmp_path):
  return streams.harvested(texts, tmp_path / 'store')


def test_processes_that_tokenize_change_nothing(opened):
  device = mesh.make_mesh(1, 1, jax.devices()[:1])
  subject = toy.subject()
  with_two = from_text.TextFeed(
    opened, 16, 3, 1, device, None, subject, workers=2
  )
  runs.assert_same_bits(
    streams.batches(with_two, 0, 20),
    streams.batches(streams.feed(opened), 0, 20),
  )
