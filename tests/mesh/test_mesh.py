"""Meshes, rules and their errors."""

import dataclasses

import flax.struct
import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from sae_jax import errors, mesh


def test_mesh_has_the_axes_and_all_devices():
  made = mesh.make_mesh(2, 4)
  assert made.axis_names == mesh.AXES
  assert dict(made.shape) == {'data': 2, 'latent': 4}
  assert set(made.devices.flat) == set(jax.devices())
  assert dict(mesh.make_mesh(0, 8).shape) == {'data': 1, 'latent': 8}


def test_rules_translate_letters():
  assert mesh.RULES.spec('BD') == P('data', None)
  assert mesh.RULES.spec('ND') == P('latent', None)
  assert mesh.RULES.spec('') == P()
  other = mesh.ShardingRules(D='latent', N=None)
  assert other.spec('ND') == P(None, 'latent')
  made = mesh.make_mesh(2, 4)
  assert mesh.sharding(made, 'N').shard_shape((16,)) == (4,)


@flax.struct.dataclass
class Totals:
  tokens: jax.Array
  x_D: jax.Array


@flax.struct.dataclass
class Report:
  totals: Totals
  fired_N: jax.Array
  mean_of_data: jax.Array


def test_specs_follow_from_names():
  want = Report(Totals(P(), P(None)), P('latent'), P())
  assert mesh.specs_of(Report) == want
  arrays = Report(Totals(1.0, np.ones(4)), np.ones(8), 2.0)
  assert mesh.specs(arrays) == want
  assert mesh.specs({'w_dec_ND': 1, 'count': 2}) == {
    'w_dec_ND': P('latent', None),
    'count': P(),
  }
  assert mesh.specs({'data_scale': 1, 'first_N_of': 2}) == {
    'data_scale': P(),
    'first_N_of': P(),
  }
  made = mesh.make_mesh(2, 4)
  assert mesh.shardings(arrays, made).fired_N.shard_shape((8,)) == (2,)


def test_control_another_name_is_another_spec():
  """Only the suffix of capitals says how an array lies."""
  renamed = {'fired': 1, 'fired_N': 1, 'fired_D': 1}
  assert mesh.specs(renamed) == {
    'fired': P(),
    'fired_N': P('latent'),
    'fired_D': P(None),
  }
  with pytest.raises(AttributeError, match='Q'):
    mesh.specs({'fired_Q': 1})


@pytest.mark.parametrize(
  ('shape', 'message'),
  [
    ((0, 3), r'mesh_latent 3 does not divide the 8 devices'),
    ((3, 2), r'mesh 3x2 needs 6 devices, there are 8: use mesh_data 4'),
    ((0, 0), r'mesh_latent 0 does not divide'),
  ],
)
def test_meshes_that_do_not_fit_are_refused(shape, message):
  with pytest.raises(errors.UserError, match=message):
    mesh.make_mesh(*shape)


@dataclasses.dataclass(frozen=True)
class Chip:
  """What the layout of a mesh asks of a device."""

  id: int
  slice_index: int
  process_index: int
  platform: str = 'gpu'
  device_kind: str = 'a device whose links are not known'


def test_data_goes_across_slices():
  chips = [Chip(i, i // 8, i // 4) for i in range(16)]
  made = mesh.make_mesh(4, 4, chips)
  assert dict(made.shape) == {'data': 4, 'latent': 4}
  slices = np.vectorize(lambda chip: chip.slice_index)(made.devices)
  # A row, whose chips exchange candidates, lies on one slice.
  assert (slices == slices[:, :1]).all()
  np.testing.assert_array_equal(slices[:, 0], [0, 0, 1, 1])
  assert len(set(made.devices.flat)) == 16
  with pytest.raises(
    errors.UserError,
    match='mesh_data 1 must be a multiple of the 2 slices: use mesh_latent 8',
  ):
    mesh.make_mesh(1, 16, chips)


def test_processes_that_do_not_fit_are_refused():
  mesh.start_processes('')
  for number, of in ((2, 2), (-1, 2), (0, 0)):
    with pytest.raises(
      errors.UserError, match=f'process_id {number} must be between'
    ):
      mesh.start_processes('localhost:1', of, number)


def test_sizes_that_do_not_divide_name_the_nearest():
  made = mesh.make_mesh(1, 8)
  mesh.check_divides('n_latents', 64, made, 'latent')
  with pytest.raises(
    errors.UserError,
    match=r'n_latents 1001 must be a multiple of the latent axis \(8\): '
    'use --n_latents=1000',
  ):
    mesh.check_divides('n_latents', 1001, made, 'latent')
