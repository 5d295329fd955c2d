"""Plans of the pass over a store, by arithmetic on a program's text."""

import dataclasses
import json
import re

import jax
import pytest

from sae_jax import errors
from sae_jax import mesh as mesh_lib
from sae_jax.autoencoder import SaeConfig
from sae_jax.cli.stages import plan as stage
from sae_jax.ops import scopes
from sae_jax.plan import footprint, planner, steps, table
from sae_jax.plan.footprint import Compiled, Footprint
from sae_jax.plan.steps import probing
from sae_jax.probing.scan.config import ScanConfig
from sae_jax.tpu.chips import CHIPS
from sae_jax.tpu.slices import Slices
from sae_jax.training.config import TrainConfig
from tests.support import binaries

B, N, D, K = 1024, 65_536, 256, 8
SAE = SaeConfig(d_model=D, n_latents=N, k=K)
CONFIG = probing.PassConfig(SAE, batch_size=B)
# A loop that offers pairs to lists, as long as data says; two choices by what
# the rows are for; and the encoder's product.
TEXT = """
%longer (c: (s32[], s32[], f32[1048576])) -> pred[] {
  %c = (s32[], s32[], f32[1048576]{0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=1
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
%offer (b: (s32[], s32[], f32[1048576])) -> (s32[], s32[], f32[1048576]) {
  %b = (s32[], s32[], f32[1048576]{0}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %m = s32[] get-tuple-element(%b), index=1
  %lists = f32[1048576]{0} get-tuple-element(%b), index=2
  %new = f32[1048576]{0} sort(%lists), SCOPE(top examples/while/body/sort)
  ROOT %out = (s32[], s32[], f32[1048576]{0}) tuple(%j, %m, %new)
}
%nothing (a: f32[524288]) -> f32[524288] {
  ROOT %a = f32[524288]{0} parameter(0)
}
%score (s: f32[524288]) -> f32[524288] {
  %s = f32[524288]{0} parameter(0)
  ROOT %sum = f32[524288]{0} negate(%s), SCOPE(metrics/cond/branch_1_fun/neg)
}
%fit (t: f32[524288]) -> f32[524288] {
  %t = f32[524288]{0} parameter(0)
  %a = f32[524288]{0} negate(%t), SCOPE(principal components/cond/branch_1_fun/a)
  ROOT %b = f32[524288]{0} negate(%a), SCOPE(principal components/cond/branch_1_fun/b)
}
ENTRY %step (x: bf16[1024,256], w: bf16[65536,256], v: f32[524288]) -> f32[8] {
  %x = bf16[1024,256]{1,0} parameter(0)
  %w = bf16[65536,256]{1,0} parameter(1)
  %v = f32[524288]{0} parameter(2)
  %lists = f32[1048576]{0} parameter(3)
  %zero = s32[] constant(0)
  %many = s32[] parameter(4)
  %which = s32[] parameter(5)
  %pre = f32[1024,65536]{1,0:S(1)} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={1}, SCOPE(encoder/dot_general)
  %start = (s32[], s32[], f32[1048576]{0}) tuple(%zero, %many, %lists)
  %loop = (s32[], s32[], f32[1048576]{0}) while(%start), condition=%longer, body=%offer, SCOPE(top examples/while)
  %tested = f32[524288]{0} conditional(%which, %v, %v), branch_computations={%nothing, %score}, SCOPE(metrics/cond)
  %fitted = f32[524288]{0} conditional(%which, %v, %v), branch_computations={%nothing, %fit}, SCOPE(principal components/cond)
OTHERS
  ROOT %end = f32[8]{0:S(1)} constant({...})
}
"""  # noqa: E501
OTHERS = (
  *(scopes.PREPROCESSING, scopes.DECODER, scopes.CODES, scopes.PAIRS),
  *(scopes.STATISTICS, scopes.RANDOM, scopes.NEAR),
)


def text(others=OTHERS):
  lines = '\n'.join(
    f'  %n.{i} = f32[8]{{0:S(1)}} negate(%end), SCOPE({name}/neg)'
    for i, name in enumerate(others)
  )
  return re.sub(
    r'SCOPE\((.*?)\)(?=\n)',
    r'metadata={op_name="jit(step)/shard_map/\1"}',
    TEXT.replace('OTHERS', lines),
  )


def read(case='', others=OTHERS, config=CONFIG):
  slices = Slices('v6e', (1, 1), 1, tuple(jax.devices()))
  mesh = mesh_lib.make_mesh(1, 1)
  held = footprint.arguments(config, mesh)
  compiled = Compiled(text(others), held, fits=True)
  return planner.read(config, slices, mesh, compiled, case)


def test_times_are_those_of_what_a_batch_is_for():
  chip = CHIPS['v6e']
  product = 2 * B * N * D / chip.flops
  offers = 2 * 4 * 2**20 / chip.hbm_bandwidth
  rows = 4 * 2**20 / chip.hbm_bandwidth
  plan = read()
  assert plan.encoder_product_s == pytest.approx(product)
  seconds = {part.name: part.seconds for part in plan.roofline.parts}
  assert seconds['encoder and top-k'] == pytest.approx(product)
  assert seconds['top examples'] == pytest.approx(offers)
  assert seconds['principal components'] == pytest.approx(2 * rows)
  assert 'metrics' not in seconds and not plan.loops_s
  assert plan.roofline.step_s == pytest.approx(product + offers + 2 * rows)
  assert read('test').roofline.step_s == pytest.approx(product + offers + rows)
  # 16,384 slots are offered 1,024 at a time, and half of them are pairs.
  assert read('first').roofline.step_s == pytest.approx(
    product + 8 * offers + 2 * rows
  )
  figures = json.loads(json.dumps(plan.to_dict()))
  assert figures['program'] == 'probe' and figures['rows'] == 'train'
  ratio = (product + offers + 2 * rows) / product
  assert figures['ratio_to_encoder_product'] == pytest.approx(ratio)
  tested = figures['by_rows']['test']
  assert tested['tokens_per_s_at_most'] == pytest.approx(
    B / (product + offers + rows)
  )
  words = ' '.join(' '.join(table.lines(plan)).split())
  assert f'train rows takes {ratio:.2f} times' in words
  assert 'at most 12.5% of the pairs' in words


def test_a_part_without_its_scope_is_an_error():
  for name in OTHERS:
    others = [other for other in OTHERS if other != name]
    with pytest.raises(errors.DefectError, match=f'no instruction of: {name}'):
      read(others=others)
  # What is not asked for need not be there.
  scan = ScanConfig(random_examples=0)
  others = [name for name in OTHERS if name != scopes.RANDOM]
  config = dataclasses.replace(CONFIG, scan=scan)
  assert read(others=others, config=config).fits


def test_memory_has_its_parts():
  memory = read().footprint
  latents = memory.arguments['reducers']
  # Words of each latent: statistics, lists of 16, 8 and 8 examples, counts of
  # near misses, and tokens it fired on.
  assert latents == 4 * N * (4 + 8 + 1 + 160 + 5 * (16 + 8 + 8) + 2 + 2)
  weights = 2 * N * D + N + 2 * D + 2
  assert memory.arguments['parameters'] == 4 * weights
  # And three numbers of 32 bits and two spans of two.
  assert memory.arguments['batch'] == B * (2 * D + 8) + 7 * 4
  assert memory.held == memory.total == sum(memory.arguments.values())
  assert Footprint({'batch': 3}, 4, 5, 6).parts == {
    'batch': 3, 'temporaries': 4, 'program': 5, 'padding': 6,
  }  # fmt: skip


def test_flags_name_the_program_and_what_is_kept():
  with binaries.defined(stage.define) as values:
    values(['sae-plan', '--d=256', '--n=65536', '--k=8', '--batch=1024'])
    assert stage._config_and_case()[0].sae == CONFIG.sae
    assert isinstance(stage._config_and_case()[0], TrainConfig)
    values.unparse_flags()
    probe = '--program=probe --near_examples=0 --controls=2 --rows=test'
    values(f'sae-plan --d=256 --n=65536 --k=8 --batch=1024 {probe}'.split())
    config, case = stage._config_and_case()
  assert case == 'test' and config.scan.near_examples == 0
  scan = ScanConfig(batch_rows=1024)
  assert config == dataclasses.replace(
    CONFIG, scan=dataclasses.replace(scan, near_examples=0), controls=2
  )


def test_one_data_shard_is_preferred_and_sizes_must_divide():
  step = steps.of(CONFIG)
  assert step.rank(1, 2.0) < step.rank(2, 1.0)
  config = dataclasses.replace(CONFIG, batch_size=1001)
  mesh = jax.sharding.AbstractMesh((2, 4), mesh_lib.AXES)
  with pytest.raises(errors.UserError, match='use --batch_size=1000'):
    step.check_mesh(config, mesh)
  with pytest.raises(errors.UserError, match='leave --implementation out'):
    step.lowered(CONFIG, mesh_lib.make_mesh(1, 1), 'dense')
