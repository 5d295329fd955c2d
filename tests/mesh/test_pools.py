"""A harvest over a mesh."""

import dataclasses

import numpy as np
import pytest

from sae_jax import errors, store
from sae_jax.harvesting import pools
from tests.support import toy


@pytest.mark.parametrize(('data', 'latent'), [(4, 1), (2, 2)])
def test_a_mesh_harvests_the_same_rows(texts, tmp_path, data, latent):
  """And resumes what another began: where it runs is not part of a plan."""
  alone = toy.run(toy.config(texts), tmp_path / 'alone')
  spread = toy.config(texts, mesh_data=data, mesh_latent=latent)
  toy.run(spread, tmp_path / 'spread')
  rows = [
    store.open_store(str(tmp_path / name)).read_rows(0, alone.n_rows)
    for name in ('alone', 'spread')
  ]
  np.testing.assert_allclose(*rows, atol=2e-5)
  toy.run(dataclasses.replace(spread, n_tokens=10**6), tmp_path / 'alone')
  with pytest.raises(errors.UserError, match='batch_contexts 4 must be'):
    toy.run(toy.config(texts, mesh_data=8), tmp_path / 'other')


def test_the_mesh_is_used(texts, tmp_path, monkeypatch):
  placed, run = [], pools._residuals

  def counted(config, params, tokens_BT, *rest):
    shard = params['blocks']['gate'].addressable_shards[0].data
    placed.append(
      (
        tokens_BT.addressable_shards[0].data.shape[0],
        shard.size / params['blocks']['gate'].size,
      )
    )
    return run(config, params, tokens_BT, *rest)

  monkeypatch.setattr(pools, '_residuals', counted)
  toy.run(toy.config(texts, mesh_data=2, mesh_latent=2), tmp_path / 'spread')
  assert set(placed) == {(2, 0.5)}
