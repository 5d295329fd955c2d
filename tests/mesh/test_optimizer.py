"""One pass over the decoder: alone and on meshes."""

import dataclasses
import functools

import jax
import pytest

from sae_jax import mesh as mesh_lib
from sae_jax.training import optimizer
from tests.support.optimizer_checks import after, near, problem, WIDE


@pytest.mark.parametrize(
  'clip_norm, mesh', [(0.0, None), (2.0, None), (0.0, (1, 8)), (2.0, (2, 4))]
)
def test_one_pass_over_the_decoder_changes_nothing(clip_norm, mesh):
  config = dataclasses.replace(WIDE, clip_norm=clip_norm)
  params, grads = problem(n=24, d=128)
  want = after(config, params, grads[:3])
  if mesh:
    mesh = mesh_lib.make_mesh(*mesh)
    params, *grads = (
      {
        name: jax.device_put(a, mesh_lib.sharding(mesh, name.split('_')[-1]))
        for name, a in arrays.items()
      }
      for arrays in (params, *grads[:3])
    )
  update = functools.partial(
    optimizer.update, implementation='pallas', mesh=mesh
  )
  got = after(config, params, grads[:3], update)
  assert near(got, want)
  if mesh:
    assert got[1].ema.ema['w_dec_ND'].sharding.spec == mesh_lib.RULES.spec('ND')
  # Control: other clipping is seen.
  other = dataclasses.replace(config, clip_norm=3.0)
  assert not near(after(other, params, grads[:3], update), want)
