"""Slices that there are."""

import pytest

from sae_jax.tpu import slices as slices_lib


@pytest.mark.parametrize(
  ('chip', 'wanted', 'shape'),
  [
    ('v6e', 5, (2, 4)),
    ('v6e', 999, (16, 16)),
    ('v5p', 64, (4, 4, 4)),
    ('v5p', 512, (8, 8, 8)),
    ('v5p', 65, (4, 4, 8)),
  ],
)
def test_the_nearest_slice_is_compact(chip, wanted, shape):
  assert slices_lib.nearest(chip, wanted) == shape
