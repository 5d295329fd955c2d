"""The benchmark compares equal work and reports it consistently."""

import jax
import numpy as np

from experiments.benchmarks import sparse


def test_both_implementations_do_the_same_work():
  keys = jax.random.split(jax.random.key(0), 3)
  args = (
    jax.random.normal(keys[0], (6, 5)),
    jax.random.normal(keys[1], (16, 5)),
    jax.random.randint(keys[2], (6, 4), 0, 16),
  )
  got, want = (sparse._products(name)(*args) for name in ('gather', 'dense'))
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert np.abs(a).max() > 0


def test_the_ratio_is_of_the_seconds_it_prints():
  row = sparse.measure(d=64, n=512, batch=256, k=4, repeats=3)
  assert row['n_over_k'] == 128
  ratio = row['dense_s'] / row['gather_s']
  np.testing.assert_allclose(row['dense_over_gather'], ratio, rtol=0.1)
