"""The one-pass optimiser kernel over shards."""

import functools

import jax
import numpy as np
import pytest

from sae_jax import mesh as mesh_lib
from sae_jax.ops.adam_rows import api, reference
from tests.support.adam_runs import close, problem, run


def sharded(mesh, arrays):
  return [jax.device_put(a, mesh_lib.sharding(mesh, 'ND')) for a in arrays]


@pytest.mark.parametrize('latent', [4, 8])
def test_shards_equal_one_device(latent):
  mesh = mesh_lib.make_mesh(8 // latent, latent)
  state, grads = problem(40, 128, steps=2)
  want = run(state, grads, 'pallas')
  got = run(sharded(mesh, state), sharded(mesh, grads), 'pallas', mesh=mesh)
  assert close(got, want)
  assert all(a.sharding.spec == mesh_lib.RULES.spec('ND') for a in got[0])
  (p_ND, *_), _ = want
  norm = functools.partial(api.squared_norm, implementation='pallas', mesh=mesh)
  got = jax.jit(norm)(*sharded(mesh, [p_ND, grads[1]]))
  np.testing.assert_allclose(
    got, reference.squared_norm(p_ND, grads[1]), rtol=1e-6
  )
  # Control: a shard's rows are not all.
  few = 40 // latent
  part = reference.squared_norm(p_ND[:few], grads[1][:few])
  assert not np.isclose(got, part, rtol=1e-2)
