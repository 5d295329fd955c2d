"""Slices that there are, and their names."""

import re

import pytest

from sae_jax import errors
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


@pytest.mark.parametrize(
  ('name', 'chip', 'shape'),
  [
    ('v6e:4x4', 'v6e', (4, 4)),
    ('v6e-16', 'v6e', (4, 4)),
    ('v6e-8', 'v6e', (2, 4)),
    ('v6e-1', 'v6e', (1, 1)),
    ('v6e-4x8', 'v6e', (4, 8)),
    ('v5e-16', 'v5e', (4, 4)),
    ('v5litepod-16', 'v5e', (4, 4)),
    ('v5litepod:4x4', 'v5e', (4, 4)),
    # These count TensorCores.
    ('v4-8', 'v4', (2, 2, 1)),
    ('v5p-8', 'v5p', (2, 2, 1)),
    ('v5p-32', 'v5p', (2, 2, 4)),
    ('v5p-1024', 'v5p', (8, 8, 8)),
    ('tpu7x-16', 'tpu7x', (2, 2, 2)),
    ('ct5lp-hightpu-4t', 'v5e', (2, 2)),
    ('ct5lp-hightpu-8t', 'v5e', (2, 4)),
    ('ct6e-standard-1t', 'v6e', (1, 1)),
    ('ct5p-hightpu-4t', 'v5p', (2, 2, 1)),
    ('ct4p-hightpu-4t', 'v4', (2, 2, 1)),
    ('tpu7x-standard-4t', 'tpu7x', (2, 2, 1)),
  ],
)
def test_slices_are_known_by_the_names_of_google_cloud(
  name, chip, shape, monkeypatch
):
  monkeypatch.setattr(slices_lib, '_devices', lambda *_: ())
  slices = slices_lib.find(name)
  assert (slices.chip, slices.shape) == (chip, shape)


@pytest.mark.parametrize(
  ('name', 'said'),
  [
    ('v2-8', "chip 'v2' is not known, there are v4, v5e, v5p, v6e, tpu7x: use"),
    ('v3-32', "chip 'v3' is not known"),
    ('v6e-12', 'there is no such slice of v6e: use v6e:4x4'),
    ('v6e-512', 'no such slice of v6e: use v6e:16x16 --num_slices=2'),
    ('v5litepod-3', 'no such slice of v5e: use v5e:2x2'),
    ('v5p-7', 'counts TensorCores, two a chip: use v5p-8'),
    ('v5p-10', 'no such slice of v5p: use v5p:2x2x2'),
    ('ct5p-hightpu-1t', 'no such slice of v5p: use v5p:2x2x1'),
    ('ct9-standard-4t', "chip 'ct9' is not known"),
    ('v6e-many', 'no such slice of v6e: use v6e:1x1'),
    ('-', "chip '' is not known"),
    ('v6e-0', 'no such slice of v6e: use v6e:1x1'),
    ('v6e-' + '9' * 5000, 'is too long for a name: write v6e:16x16'),
    ('v6e:4x4\n', 'no such slice of v6e: use v6e:4x4'),
  ],
)
def test_what_is_no_slice_names_one_that_is(name, said):
  with pytest.raises(errors.UserError, match=re.escape(said)):
    slices_lib.find(name)
