"""sae-plan: slices that there are, bounds by hand, plans that hold."""

import dataclasses
import io
import json
import math
import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from sae_jax import errors
from sae_jax import plan as plan_lib
from sae_jax.autoencoder import SaeConfig
from sae_jax.plan import footprint, meshes, planner, remedies, roofline, table
from sae_jax.plan.program import costs as costs_lib
from sae_jax.plan.program import exchange, parts
from sae_jax.plan.steps import training
from sae_jax.tpu import aot
from sae_jax.tpu import slices as slices_lib
from sae_jax.tpu.chips import CHIPS
from sae_jax.training import step
from sae_jax.training.config import TrainConfig
from sae_jax.training.objective import ObjectiveConfig
from tests.support.programs import module_of

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
# Tokens, latents of one of four shards, width.
B, S, D = 384, 512, 256


def train_config(**kwargs):
  """A step that compiles in seconds, AuxK included."""
  values = {
    'sae': SaeConfig(d_model=D, n_latents=4 * S, k=8),
    'objective': ObjectiveConfig(k_aux=8),
    'batch_size': B,
  }
  return TrainConfig(**(values | kwargs))


@pytest.fixture(scope='module')
def compiled(line):
  return footprint.compile_step(train_config(), line, 'dense')


@pytest.fixture(scope='module')
def planned(v5e, line, compiled):
  config = train_config(mesh_data=1, mesh_latent=4)
  return planner.read(config, v5e, line, compiled)


@pytest.mark.parametrize(
  ('topology', 'part'),
  [
    ('v7e:2x2', "chip 'v7e' is not known, there are v4, v5e, v5p, v6e, tpu7x"),
    ('v6e:3x3', 'no such slice of v6e: use v6e:4x4'),
    ('v5p:3x2x1', 'no such slice of v5p: use v5p:2x2x2'),
    ('v5p:4x4x5', 'no such slice of v5p: use v5p:4x4x8'),
    ('v6e:16x32', 'use v6e:16x16 --num_slices=2'),
    ('v6e', 'use v6e:1x1'),
    ('', 'is not known'),
  ],
)
def test_slices_that_are_not_name_one_that_is(topology, part):
  with pytest.raises(errors.UserError, match=re.escape(part)):
    slices_lib.find(topology)


def test_every_small_slice_that_is_named_can_be_compiled_for():
  for chip in CHIPS:
    for shape in slices_lib.offered(chip)[:4]:
      slices = slices_lib.find(slices_lib.name(chip, shape))
      per_chip = 2 if chip == 'tpu7x' else 1
      assert slices.devices_per_chip == per_chip
      assert len(slices.devices) == per_chip * math.prod(shape)


@pytest.mark.parametrize('chip', CHIPS)
def test_the_room_in_hbm_is_what_the_compiler_says(chip):
  slices = slices_lib.find(slices_lib.name(chip, slices_lib.offered(chip)[1]))
  mesh = meshes.make_mesh(slices, 0, 1)
  x = jax.ShapeDtypeStruct(
    (len(slices.devices), 2**18, 2**18), BF16,
    sharding=NamedSharding(mesh, P('data')),
  )  # fmt: skip
  with pytest.raises(jax.errors.JaxRuntimeError) as error:
    jax.jit(jnp.sin).lower(x).compile()
  room = re.search(r'available HBM \(([\d.]+)G\)', str(error.value))
  assert slices.device.hbm_gib == pytest.approx(float(room[1]), abs=0.01)
  # The array and its sine, of all that the compiler counts.
  assert footprint._needed_bytes(str(error.value)) == 2 * 2**37


def test_times_are_those_of_the_slower_of_products_and_memory(v5e, line):
  costs = costs_lib.Costs(
    parts={
      'a': costs_lib.Work(1, 197e12, 819e9 / 2),
      'b': costs_lib.Work(1, 197e12 / 4, 819e9 * 2),
    }
  )
  costs.collectives[exchange.Collective('all-reduce', (), 'a')] = np.array(
    [3, 200e9]
  )
  bound = roofline.roofline(costs, v5e, line)
  seconds = {part.name: part.seconds for part in bound.parts}
  assert seconds == {'a': 1, 'b': 2}
  assert bound.exchanges_s == pytest.approx(2 * 3 / 4)
  assert bound.step_s == 3
  assert bound.without_overlap_s == pytest.approx(3 + 1.5)


@pytest.mark.parametrize(
  ('kind', 'data', 'latent', 'want'),
  [
    # 400 GB/s over all links of v6e, half of them along one dimension.
    ('all-reduce', 1, 256, 2 * 255 / 256 / 400e9),
    ('all-reduce', 16, 16, 2 * 15 / 16 / 200e9),
    ('all-gather', 16, 16, 15 / 200e9),
    ('reduce-scatter', 16, 16, 15 / 16 / 200e9),
    # Of each byte half crosses the middle of 16: 128 chips, 32 links each way.
    ('all-to-all', 1, 256, 128 / 2 / (32 * 100e9)),
    ('all-to-all', 16, 16, 8 / 2 / (2 * 100e9)),
    ('collective-permute', 16, 16, 1 / 200e9),
  ],
)
def test_exchanges_take_the_links_that_they_span(kind, data, latent, want):
  slices = slices_lib.find('v6e:16x16')
  mesh = meshes.make_mesh(slices, data, latent)
  seconds = roofline.link_seconds(kind, 1.0, mesh.devices[0], slices)
  assert seconds == pytest.approx(want)


def test_devices_share_their_chip():
  slices = slices_lib.find('tpu7x:2x2x1')
  assert slices.device.flops == CHIPS['tpu7x'].flops / 2
  assert slices.hbm_limit == pytest.approx(94.74 * 2**30)


def test_memory_has_its_parts(planned):
  memory = planned.footprint
  weights = 2 * S * D * 4 + S * 4 + D * 4
  # The mean and scale of the data are not trained.
  state = weights + D * 4 + 4, 2 * weights + 4, weights + 4, S * 4 + 3 * 4
  assert tuple(memory.arguments.values()) == (*state, B * D * 2)
  assert memory.temporaries > 0 and memory.program > 0
  # The compiler's arguments are these, but for tiles of small ones.
  assert 0 <= memory.padding < 0.02 * memory.held
  assert planned.fits and memory.total < planned.slices.hbm_limit


def test_products_of_the_step_are_all_counted(planned):
  work = planned.costs.parts
  encode = 2 * B * D * S
  assert work['encoder and top-k'].flops == encode
  total = planned.costs.total.flops - work[parts.AUXK].flops
  # The decoder, its two gradients and the encoder's are products as large.
  assert total == 5 * encode
  # Adam reads 4 of a kind and a gradient, and writes 4.
  weights = 2 * S * D * 4
  moved = work[parts.OPTIMIZER].hbm_bytes
  assert 7 * weights < moved < 16 * weights


def test_auxk_counts_by_the_dead_latents_that_are_assumed(
  v5e, line, compiled, planned
):
  config = planned.config
  flops = {
    dead: planner.read(config, v5e, line, compiled, dead)
    .costs.parts.get(parts.AUXK, costs_lib.Work())
    .flops
    for dead in training.CASES
  }
  assert flops['none'] == 0 < flops['few'] < flops['all']
  assert planned.costs.parts[parts.AUXK].flops == flops['few']
  seconds = planned.choices[parts.AUXK]
  assert list(seconds) == sorted(seconds)
  assert planned.cases['few'] == planned.roofline != planned.cases['all']
  assert any('few dead latents' in text for text in table.lines(planned))


def test_a_dense_buffer_is_found(planned):
  """Dense products of codes make arrays of tokens x latents."""
  assert planned.codes == B * S
  shapes = {b.shape.dims for b in planned.dense}
  # Weights that are rounded are none of them, though they might be as large.
  assert (B, S) in shapes and (S, D) not in shapes


def test_blocks_of_tokens_leave_no_dense_buffer(line, v5e):
  """Control: a program that never makes them."""

  def f(x, w):
    def block(x):
      return jax.lax.top_k(x @ w.T, 4)

    return jax.lax.map(block, x.reshape(8, 64, 256))

  module = module_of(line, f, ((512, 256), BF16), ((2048, 256), BF16))
  assert costs_lib.buffers(module, 64 * 2048)
  assert not costs_lib.buffers(module, 512 * 2048)


def test_figures_are_for_json_and_for_reading(planned):
  whole = dataclasses.replace(planned, tokens=10**12, price_per_chip_hour=2.0)
  figures = json.loads(json.dumps(whole.to_dict()))
  assert figures['measured'] is False and figures['fits'] is True
  per_chip = sum(figures['hbm_parts_per_chip_gib'].values())
  assert figures['hbm_per_chip_gib'] == pytest.approx(per_chip)
  parts_s = sum(p['seconds'] for p in figures['roofline_parts'].values())
  links_s = sum(exchange['seconds'] for exchange in figures['exchanges'])
  assert figures['roofline_step_s'] == pytest.approx(max(parts_s, links_s))
  rate = B / figures['roofline_step_s']
  assert figures['tokens_per_s_at_most'] == pytest.approx(rate)
  assert figures['hours_at_least'] == pytest.approx(10**12 / rate / 3600)
  assert figures['cost_at_least'] == pytest.approx(
    figures['hours_at_least'] * 4 * 2.0
  )
  text = list(table.lines(whole))
  assert text[0].startswith('nothing here was measured')
  assert any(line.startswith('FITS: ') for line in text)
  assert any('at most' in line and 'tokens/s' in line for line in text)
  assert any('cost at least' in line for line in text)


def test_what_does_not_fit_says_what_does():
  lines = []
  big = train_config(
    sae=SaeConfig(d_model=512, n_latents=2**20, k=8),
    objective=ObjectiveConfig(k_aux=0),
  )
  plan = plan_lib.plan(big, 'v5e:1x1', compiles=1, report=lines.append)
  assert not plan.fits and plan.roofline.step_s > 0
  needs, room = plan.footprint.total, plan.slices.hbm_limit
  # Parameters, moments, average and gradients are 20 GiB.
  assert room < 16 * 2**30 and needs > 20 * 2**30
  text = '\n'.join(table.lines(plan))
  assert f'{(needs - room) / 2**30:.2f} GiB too much' in text
  first = plan.remedies[0]
  assert first.compiled and first.flags.startswith('--topology=v5e:2x2 --mesh')
  assert first.hbm_bytes < room and first.flags in text
  others = [remedy for remedy in plan.remedies if not remedy.compiled]
  assert others and 'by arithmetic, not compiled' in text
  # Fewer tokens at a time would not do: there are few of them.
  assert not any('micro' in remedy.flags for remedy in plan.remedies)


def test_fewer_tokens_at_a_time_are_proposed_where_they_help(v5e, line):
  config = train_config(
    sae=SaeConfig(d_model=D, n_latents=2**18, k=8),
    batch_size=2**17,
    mesh_data=1,
    mesh_latent=4,
  )
  arguments = footprint.arguments(config, line)
  needs = dataclasses.replace(arguments, temporaries=20 * 2**30)
  proposed = remedies.find(config, v5e, needs, None, 0, print)
  assert proposed[0].flags == '--micro_batches=2' and not proposed[0].compiled
  # Of tokens alone, so that half of them takes half of it.
  assert 9 * 2**30 < proposed[0].hbm_bytes < 13 * 2**30


@pytest.mark.parametrize(
  ('config', 'mesh', 'part'),
  [
    (
      train_config(sae=SaeConfig(d_model=D, n_latents=4097, k=8)), (1, 4),
      'n_latents 4097 must be a multiple of the latent axis (4): use '
      '--n_latents=4096',
    ),
    (
      train_config(batch_size=1023), (4, 1),
      'use --batch_size=1024',
    ),
    (
      train_config(batch_size=1000, micro_batches=3), (2, 2),
      'data axis (2) times micro_batches (3): use --batch_size=1002',
    ),
    (train_config(), (1, 5), 'mesh 1x5 needs 5 devices, there are 4: use'),
    (train_config(sae=SaeConfig(k=8)), (1, 4), 'd_model 0'),
    (
      train_config(
        batch_size=511, sae=SaeConfig(d_model=D, n_latents=4097, k=8)
      ),
      'auto',
      'use --batch_size=512',
    ),
  ],
)  # fmt: skip
def test_uneven_meshes_name_the_nearest_even_sizes(config, mesh, part):
  with pytest.raises(errors.UserError, match=re.escape(part)):
    plan_lib.plan(config, 'v5e:2x2', mesh=mesh)


def test_a_mesh_that_does_not_lie_on_the_torus_names_one(monkeypatch):
  slices = slices_lib.find('v6e:4x4')
  real = meshes.mesh_lib.make_mesh

  def refuses(data, latent, devices):
    if latent == 8:
      raise NotImplementedError('Failed to find assignment')
    return real(data, latent, devices)

  monkeypatch.setattr(meshes.mesh_lib, 'make_mesh', refuses)
  with pytest.raises(
    errors.UserError, match='links of v6e:4x4: use --mesh=1x16'
  ):
    meshes.make_mesh(slices, 2, 8)
  config = train_config()
  assert (2, 8) not in meshes.allowed(config, slices)


STEP_SCOPES = (
  *('preprocessing', 'jvp(encoder)', 'transpose(jvp(encoder))', 'AuxK'),
  *('jvp(encoder and decoder)', 'transpose(jvp(encoder and decoder))'),
  *('top-k over shards', 'optimizer'),
)


@pytest.fixture
def compiled_meshes(monkeypatch):
  """The meshes that are compiled for, by a stand-in for the compiler."""
  meshes_seen = []

  def compile_step(config, mesh, implementation):
    meshes_seen.append((config.mesh_data, config.mesh_latent))
    text = 'ENTRY %m (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n'
    for i, scope in enumerate(STEP_SCOPES):
      text += f'  %n.{i} = f32[8]{{0}} negate(%p), '
      text += f'metadata={{op_name="jit(step)/{scope}/neg"}}\n'
    slow = 'f32[2048,1024]{1,0}' * (config.mesh_latent == 4) or 'f32[8]{0}'
    text += f'  ROOT %c = {slow} copy(%p)\n}}\n'
    state = footprint.arguments(config, mesh)
    return footprint.Compiled(text, state, fits=config.mesh_latent > 1)

  monkeypatch.setattr(footprint, 'compile_step', compile_step)
  return meshes_seen


def test_meshes_are_ranked_and_guesses_are_marked_as_such(compiled_meshes):
  plan = plan_lib.plan(train_config(), 'v5e:2x2', compiles=2)
  assert len(compiled_meshes) == 2 and len(plan.meshes) == 3
  assert [mesh.compiled for mesh in plan.meshes] == [True, True, False]
  every = plan_lib.plan(train_config(), 'v5e:2x2', compiles=9)
  order = [(mesh.data, mesh.latent) for mesh in every.meshes]
  # The slow one comes second, the one that does not fit last.
  assert order == [(2, 2), (1, 4), (4, 1)]
  assert (every.config.mesh_data, every.config.mesh_latent) == (2, 2)


def test_a_part_that_is_missing_is_no_refused_mesh(
  compiled_meshes, monkeypatch
):
  without_auxk = tuple(scope for scope in STEP_SCOPES if scope != 'AuxK')
  monkeypatch.setattr(sys.modules[__name__], 'STEP_SCOPES', without_auxk)
  lines = []
  with pytest.raises(errors.DefectError, match='no instruction of: AuxK'):
    plan_lib.plan(train_config(), 'v5e:2x2', report=lines.append)
  assert len(compiled_meshes) == 1
  assert not any('refused' in line for line in lines)


def test_a_step_that_refuses_a_config_says_what_it_takes(monkeypatch):
  real = training.step.lowered

  def refuses(config, *args):
    if config.micro_batches < 4:
      raise errors.UserError('too many pairs: use a smaller batch')
    return real(config, *args)

  monkeypatch.setattr(training.step, 'lowered', refuses)
  with pytest.raises(errors.UserError) as error:
    plan_lib.plan(train_config(batch_size=2**12), 'v5e:2x2', mesh=(2, 2))
  assert str(error.value) == (
    'mesh 2x2: too many pairs: use a smaller batch '
    '(--micro_batches=4 is accepted)'
  )


def test_a_large_batch_is_cut_for_auxk_whoever_chose_the_kernels():
  # Its 33 million candidates are too many for one kernel.
  config = train_config(
    sae=SaeConfig(d_model=128, n_latents=2**20, k=32),
    objective=ObjectiveConfig(k_aux=32),
    batch_size=2**20,
  )
  mesh = aot.mesh('v6e:4x4', 1, 16)
  for implementation in (None, 'pallas'):
    module = step.lowered(config, mesh, implementation).compiler_ir()
    # As text, kernels are written letter by letter.
    module.operation.write_bytecode(program := io.BytesIO())
    assert b'segment_sums' in program.getvalue()
