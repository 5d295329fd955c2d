"""The declaration of the feature table is what tables are made and read by."""

import re

import numpy as np
import pytest

from sae_jax import errors
from sae_jax.features import table
from tests.support import synthetic_features


@pytest.fixture(scope='module')
def synthetic():
  features, _, vocabulary = synthetic_features.make(
    n_latents=12, n_examples=3, window=8, n_tokens=2000
  )
  return features, len(vocabulary)


def test_a_table_has_the_declared_arrays_and_types(synthetic):
  features, vocabulary_size = synthetic
  assert features.keys() == table.ARRAYS.keys()
  for name, declared in table.ARRAYS.items():
    assert features[name].dtype == declared.dtype
    assert features[name].ndim == len(declared.axes)
  table.check(features, vocabulary_size)


def test_arrays_take_their_declared_types(synthetic):
  features, _ = synthetic
  wide = {
    name: array.astype(np.float64 if array.dtype.kind == 'f' else np.int64)
    for name, array in features.items()
  }
  for name, array in table.make(wide).items():
    assert array.dtype == features[name].dtype
    np.testing.assert_array_equal(array, features[name])


def test_names_and_axes_that_are_not_declared_are_refused(synthetic):
  features, _ = synthetic
  lacking = {k: v for k, v in features.items() if k != 'skew'}
  with pytest.raises(ValueError, match=re.escape("['skew']")):
    table.make(lacking)
  with pytest.raises(ValueError, match=re.escape("['kurtosis']")):
    table.make(features | {'kurtosis': features['skew']})
  with pytest.raises(ValueError, match=r'count has shape \(12, 1\)'):
    table.make(features | {'count': features['count'][:, None]})


@pytest.mark.parametrize(
  'name', [name for name, array in table.ARRAYS.items() if array.is_token]
)
def test_each_array_of_tokens_is_checked_against_the_vocabulary(
  synthetic, name
):
  features, vocabulary_size = synthetic
  outside = features[name].copy()
  outside.flat[0] = vocabulary_size
  with pytest.raises(errors.UserError, match=f'{name} holds token'):
    table.check(features | {name: outside}, vocabulary_size)
