"""A sweep's plan: closed forms against compiled steps, meshes, refusals."""

import dataclasses

import pytest

from sae_jax import errors
from sae_jax.autoencoder import SaeConfig
from sae_jax.plan import closed, meshes, roofline, sweep
from sae_jax.sweeps import grid
from sae_jax.training.config import TrainConfig
from sae_jax.training.objective import ObjectiveConfig
from tests.support import binaries


def cells_of(batch=8192, k_aux=0, **axes):
  config = TrainConfig(
    sae=SaeConfig(d_model=768, n_latents=2048, k=16),
    objective=ObjectiveConfig(k_aux=k_aux),
    batch_size=batch,
  )
  return grid.without_store(config, axes)


@pytest.fixture(scope='module')
def planned():
  """A shape of dense products and one of kernels, both compiled."""
  cells = cells_of(n_latents=(2048, 16_384), k=(16,), tokens=(10**6,))
  return sweep.plan(cells, 'v5e:2x2', mesh=(2, 2))


def test_closed_forms_agree_with_compiled_steps(planned):
  assert {s.implementation for s in planned.corners} == {'dense', 'pallas'}
  assert len(planned.corners) == 2
  assert planned.most_off < sweep.TOLERANCE


def test_a_form_that_is_a_tenth_off_is_refused(planned, v5e):
  sweep.check(planned.shapes, v5e)
  for shape in planned.shapes:
    made = meshes.make_mesh(v5e, 2, 2)
    costs = closed.costs(
      closed.sizes(shape.config, v5e, made, 'few'), v5e, made
    )
    for work in costs.parts.values():
      work.hbm_bytes *= 1.1
      work.mxu_flops *= 1.1
    for put_in in costs.collectives.values():
      put_in *= 1.1
    wrong = dataclasses.replace(shape, form=roofline.roofline(costs, v5e, made))
    with pytest.raises(errors.UserError, match='closed forms are off by'):
      sweep.check([wrong], v5e)


def test_few_latents_split_the_batch_and_many_the_latents(monkeypatch):
  monkeypatch.setattr(
    sweep, '_compiled', lambda shape, slices, case, report: shape
  )
  cells = cells_of(131_072, 256, n_latents=(2**11, 2**21), k=(8, 64))
  two = sweep.plan(cells, 'v6e:8x8', most_meshes=2)
  few, many = (group.mesh for group in two.groups)
  assert few[1] < many[1]
  widths = [{c.config.sae.n_latents for c in g.cells} for g in two.groups]
  assert widths == [{2**11}, {2**21}]
  one = sweep.plan(cells, 'v6e:8x8')
  assert len({group.mesh for group in one.groups}) == 1
  assert two.hours < one.hours
  given = sweep.plan(cells, 'v6e:8x8', mesh=(64, 1))
  assert {group.mesh for group in given.groups} == {(64, 1)}
  # The state of two million latents is more than a chip has.
  assert not all(given.fits(group) for group in given.groups)
  with pytest.raises(errors.UserError, match='fits no mesh of v6e:1x1'):
    sweep.plan(cells, 'v6e:1x1')


@pytest.mark.parametrize(
  ('flags', 'part'),
  [
    (['--topology=v6e:3x3'], 'no such slice of v6e: use v6e:4x4'),
    (['--topology=v9e:2x2'], "chip 'v9e' is not known"),
    (['--topology=v6e:2x2', '--d_model=0'], 'how wide the activations are'),
    (['--topology=v6e:2x2', '--k=4096'], 'k 4096 exceeds n_latents 2048'),
    (
      ['--topology=v6e:2x2', '--grid=k=4096,8192'],
      'every combination has more active latents k than latents',
    ),
    (
      ['--topology=v6e:2x2', '--price_per_chip_hour=-1'],
      'non-negative number',
    ),
    (['--topology=v6e:2x2', '--most_meshes=0'], 'most_meshes 0 must be 1'),
    (['--topology=v6e:2x2', '--mesh=3'], "mesh '3' is not two numbers"),
    (['--topology=v6e:2x2', '--mesh=3x1'], 'use --mesh=4x1'),
    (['--topology=v6e:2x2', '--noplan'], 'add --plan'),
    (['--topology='], '--workdir is required'),
  ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(flags, part):
  common = ['--plan', '--d_model=768', '--n_latents=2048', '--k=16']
  done = binaries.run('sae-sweep', *common, *flags)
  assert done.returncode == 2 and done.stdout == ''
  *_, last = done.stderr.splitlines()
  assert last.startswith('error: ') and part in last
