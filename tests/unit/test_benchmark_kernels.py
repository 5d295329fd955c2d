"""The kernels' benchmark: what the compiler is asked, and how it adds up."""

import dataclasses

import numpy as np
import pytest

from experiments.kernels import costs as costs_lib
from experiments.kernels import estimate, table
from experiments.kernels.estimate import Estimate
from sae_jax.ops.shapes import SHAPES
from sae_jax.tpu.chips import CHIPS

SHAPE = SHAPES[0]
SIZES = {
  'encode_bodies': {
    'tokens': 1024, 'rows': 4096, 'bodies': 8, 'bodies_of_block': 2,
    'cores': 1, 'passes': 3, 'select_units': 9,
  },
  'gather': {'tokens': 32},
  'segment_sums': {'packed': 1.0, 'chunks': 256},
}  # fmt: skip


def made_up(jobs, cycles=lambda job: 1000, error=''):
  """Results of compilations that did not happen."""

  def one(job):
    name = dict(job.arguments).get('kind', job.program)
    name = {
      'encode_bodies': 'encode_topk',
      'select_units': 'select',
      'row_copies': 'gather_sum',
    }.get(name, name)
    sizes = SIZES.get(job.program, {})
    return Estimate({f'{name}.1': cycles(job)}, sizes, error)

  return {job: one(job) for job in jobs}


def per_block(job):
  """A thousand cycles for each block, chunk, unit or row."""
  sizes = dict(job.arguments)
  many = next(
    (sizes[n] for n in ('blocks', 'chunks', 'units') if n in sizes), 0
  )
  return 1000 * (many or sizes.get('n', 1)) + 77


def test_a_bound_is_the_longer_of_cycles_and_bytes():
  slow = costs_lib.Cost(1.75e9, 0)
  assert slow.seconds('v6e') == pytest.approx(1)
  moves = costs_lib.Cost(1, 2 * CHIPS['v6e'].hbm_bandwidth)
  assert moves.seconds('v6e') == pytest.approx(2)


def test_costs_grow_with_what_there_is_to_do():
  def costs(shape):
    found = {}
    for one in costs_lib.operations('v6e', shape):
      found[one.name] = one.kernel(made_up(one.jobs, per_block)).cycles
    return found

  once = costs(SHAPE)
  # Blocks of latents, the selection by 128 tokens, and what is done again.
  blocks = SHAPE.n_latents / 4096
  select = 1077 + 8 * 1000
  again = 3 * (1000 * SHAPE.n_latents + 77)
  want = SHAPE.batch / 1024 * (4000 * blocks + 8 * select)
  assert once['encode_topk'] == pytest.approx(want + again)
  assert once['gather_sum'] == 1000 * SHAPE.batch / 32
  assert once['adam_rows'] == 1000 * SHAPE.n_latents
  twice = costs(dataclasses.replace(SHAPE, batch=2 * SHAPE.batch))
  assert twice['gather_sum'] == 2 * once['gather_sum']
  assert twice['encode_topk'] - again == 2 * (once['encode_topk'] - again)
  assert twice['adam_rows'] == once['adam_rows']


def test_without_an_estimate_there_is_no_bound_and_the_table_says_so(
  monkeypatch,
):
  def run(jobs, workers, report):
    return made_up(jobs, error='FIFO is full')

  monkeypatch.setattr(estimate, 'run', run)
  found = table.measure(['v6e'], [SHAPE], 1)
  for row in found['kernels']:
    assert row['cycles'] is None and row['bound_s'] is None
    assert row['over_least'] is None and row['over_xla'] is None
    assert row['no_estimate'] == 'FIFO is full'
  assert found['steps'][0]['step_s'] is None
  assert 'not added up' in list(table.lines(found))[-1]

  def whole(jobs, workers, report):
    return made_up(jobs, per_block)

  monkeypatch.setattr(estimate, 'run', whole)
  found = table.measure(['v6e'], [SHAPE], 1)
  step = found['steps'][0]
  assert step['sort_counted']
  np.testing.assert_allclose(step['step_s'], sum(step['parts_s'].values()))
  for row in found['kernels']:
    assert row['bound_s'] >= row['hbm_bytes'] / CHIPS['v6e'].hbm_bandwidth
    copied = row['operation'] not in ('encode_topk', 'adam_rows')
    assert (row['copies_s'] is not None) == copied
    # Where a thousand cycles for a block of copies are what takes longest.
    least = max(row['least_s'], row['copies_s'] or 0)
    want = round(row['bound_s'] / least, 2)
    assert row['over_least_or_copies'] == want <= row['over_least']


def test_kernels_cross_dense_codes_where_both_take_as_long():
  def rows(fixed_s, each_s):
    for shape in SHAPES[:2]:
      assert shape.k == 32
      encoder_s = fixed_s / 4 + each_s * shape.n_latents
      yield {
        'shape': shape.name, 'operation': 'encode_topk', 'bound_s': encoder_s
      }  # fmt: skip
      for name in ('gather_sum', 'sampled_products', 'segment_sums'):
        yield {
          'shape': shape.name, 'operation': name, 'bound_s': fixed_s / 4
        }  # fmt: skip

  given = list(rows(fixed_s=2e-3, each_s=1e-8))
  dense_s = 32_768 * 1.1e-7
  # 2e-3 + 1e-8 N = 1.1e-7 N.
  ratio = table.crossing(given, dense_s)
  assert ratio == pytest.approx(2e-3 / 1e-7 / 32)
  given[1]['bound_s'] = None
  assert table.crossing(given, dense_s) is None
