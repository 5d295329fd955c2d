"""What the TPU compiler leaves of sums of 48 bits."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest

from sae_jax.probing.scan import double
from sae_jax.probing.scan.double import Double
from sae_jax.tpu import aot


@pytest.fixture(scope='module')
def one_chip():
  return aot.one_chip('v5e')


def operations(function, mesh, dtype, n_arrays):
  """How many of each operation a program has, before and after compiling."""
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  array = jax.ShapeDtypeStruct((4096,), dtype, sharding=sharding)
  lowered = jax.jit(function).lower(*[array] * n_arrays)
  texts = lowered.as_text('hlo'), lowered.compile().as_text()
  return [
    collections.Counter(re.findall(r' (add|subtract|multiply)\(', text))
    for text in texts
  ]


def add(a_hi, a_lo, b_hi, b_lo):
  return double.add(Double(a_hi, a_lo), Double(b_hi, b_lo))


def test_errors_of_sums_are_not_simplified_away(one_chip):
  before, after = operations(add, one_chip, jnp.float32, 4)
  assert before == after
  assert after['subtract'] == 6


def test_products_keep_their_halves(one_chip):
  before, after = operations(double.product, one_chip, jnp.float32, 2)
  assert before == after
  assert (after['multiply'], after['subtract']) == (4, 20)


def test_a_sum_that_may_be_simplified_is_noticed(one_chip):
  """Integers: the rest of a sum less its part is zero."""
  before, after = operations(add, one_chip, jnp.int32, 4)
  assert after['subtract'] < before['subtract']
