"""Splicing on meshes: the same losses as on one device."""

import dataclasses

import jax
import numpy as np
import pytest

from sae_jax import mesh as mesh_lib
from sae_jax.probing import downstream
from tests.support import probed


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return probed.write_store(str(tmp_path_factory.mktemp('made') / 'store'))


@pytest.fixture(scope='module')
def trained(data):
  return probed.make_trained(data)


def measure(trained, data, mesh):
  shardings = mesh_lib.shardings(trained.sae, mesh)
  placed = dataclasses.replace(
    trained, sae=jax.device_put(trained.sae, shardings)
  )
  mean_D = data.read_rows(0, data.n_train).mean(0)
  losses = downstream.measure(
    placed, probed.make_subject(), data, 60, mean_D, mesh=mesh
  )
  return dataclasses.asdict(losses)


@pytest.mark.parametrize('shape', [(8, 1), (1, 8), (2, 4)])
def test_losses_do_not_depend_on_the_mesh(trained, data, shape):
  want = measure(trained, data, mesh_lib.one_device())
  losses = measure(trained, data, mesh_lib.make_mesh(*shape))
  for name, value in want.items():
    np.testing.assert_allclose(losses[name], value, rtol=2e-5, err_msg=name)


def test_control_one_shard_s_latents_alone_would_show(trained, data):
  mesh = mesh_lib.make_mesh(1, 8)
  want = measure(trained, data, mesh)['ce_spliced']
  half_N = np.arange(trained.config.n_latents) < trained.config.n_latents / 8
  lonely = dataclasses.replace(
    trained,
    sae=trained.sae.replace(b_lat_N=np.where(half_N, 0, -1e3).astype('f4')),
  )
  assert abs(measure(lonely, data, mesh)['ce_spliced'] / want - 1) > 1e-3
