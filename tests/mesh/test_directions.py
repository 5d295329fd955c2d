"""Votes and neighbours on meshes against sorts in float64."""

import dataclasses
import pickle

import jax
import numpy as np
import pytest

from sae_jax import mesh as mesh_lib
from sae_jax.probing import lens, neighbours, row_blocks
from sae_jax.subject import sharding
from tests.support import decoders, probed, processes


def on_mesh(data, latent):
  mesh = mesh_lib.make_mesh(data, latent, jax.devices()[: data * latent])
  latents = mesh_lib.sharding(mesh, 'ND')
  w_ND = decoders.rows()
  return jax.make_array_from_callback(w_ND.shape, latents, w_ND.__getitem__)


def directions(w_ND, **settings):
  """Votes and neighbours of rows."""
  votes = lens.votes(decoders.subject(), probed.SITE, w_ND, 5, **settings)
  return *votes, *neighbours.nearest(w_ND, 6, **settings)


def expected():
  w_ND = decoders.rows()
  votes = decoders.expected_votes(decoders.subject(), w_ND, 5)
  return *votes, *decoders.expected_neighbours(w_ND, 6)


@pytest.mark.parametrize(
  ('shape', 'block_rows'),
  [((1, 1), 0), ((1, 8), 0), ((2, 4), 5), ((8, 1), 0), ((3, 2), 7)],
)
def test_directions_are_those_of_a_sort(shape, block_rows):
  got = directions(on_mesh(*shape), block_rows=block_rows)
  for array in got:
    shard = decoders.N_LATENTS // shape[1]
    assert array.sharding.shard_shape(array.shape)[0] == shard
  decoders.assert_equal(got, expected())


def test_the_subject_may_be_split_too():
  w_ND = on_mesh(4, 2)
  subject = decoders.subject()
  split = sharding.param_shardings(
    dataclasses.replace(subject.config, tied=False), w_ND.sharding.mesh
  )
  params = jax.device_put(subject.params, split)
  assert not params['unembed'].is_fully_replicated
  votes = lens.votes(
    dataclasses.replace(subject, params=params), probed.SITE, w_ND, 5
  )
  decoders.assert_equal(votes, expected()[:4])


def test_control_rows_must_go_round(monkeypatch):
  monkeypatch.setattr(jax.lax, 'ppermute', lambda rows, *_: rows)
  # Compiled for no other test.
  got = neighbours.nearest(on_mesh(1, 8), 6, block_rows=9)
  want = decoders.expected_neighbours(decoders.rows(), 6)
  with pytest.raises(AssertionError):
    decoders.assert_equal(got, want)


def test_rows_are_read_across_shards():
  w_ND, rows_ND = on_mesh(2, 4), decoders.rows()
  parts = [(0, 74), (74, 148), (148, 222), (222, 296)]
  assert row_blocks.held(w_ND) == {0: parts}
  for first, stop in ((0, 296), (60, 160), (74, 148), (295, 296)):
    np.testing.assert_array_equal(
      row_blocks.local(w_ND, first, stop), rows_ND[first:stop]
    )
    np.testing.assert_array_equal(
      row_blocks.local(w_ND[:, 0], first, stop), rows_ND[first:stop, 0]
    )


def write_held(path):
  """Writes what this process holds of the directions."""
  found = {}
  for data, latent in ((2, 4), (1, 8)):
    arrays = directions(on_mesh(data, latent))
    held = row_blocks.held(arrays[0])
    parts = held[jax.process_index()]
    span = parts[0][0], parts[-1][1]
    own = [row_blocks.local(array, *span) for array in arrays]
    found[data, latent] = held, span, own
  with open(path, 'wb') as file:
    pickle.dump(found, file)


def test_two_processes_share_the_latents(tmp_path):
  code = 'import sys; from tests.mesh import test_directions as t; '
  code += 't.write_held(sys.argv[1])'
  paths = [tmp_path / '0', tmp_path / '1']
  processes.run_two(code, paths)
  found = [pickle.loads(path.read_bytes()) for path in paths]
  for shape, spans in (
    ((2, 4), [(0, 296), (0, 296)]),
    ((1, 8), [(0, 148), (148, 296)]),
  ):
    for of_process, span in zip(found, spans):
      held, got_span, own = of_process[shape]
      assert held.keys() == {0, 1} and got_span == span
      decoders.assert_equal(own, [a[slice(*span)] for a in expected()])
