"""sae-plan: known programs read rightly, bounds by hand, plans that hold."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from sae_jax import plan as plan_lib
from sae_jax.autoencoder import SaeConfig
from sae_jax.config import UserError
from sae_jax.objective import ObjectiveConfig
from sae_jax.plan import (
  chips,
  exchange,
  footprint,
  hlo,
  parts,
  planner,
  program,
  remedies,
  roofline,
  splits,
  table,
)
from sae_jax.step import TrainConfig

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
def v5e():
  return chips.find('v5e:2x2')


@pytest.fixture(scope='module')
def line(v5e):
  return splits.make_mesh(v5e, 1, 4)


@pytest.fixture(scope='module')
def compiled(line):
  return footprint.compile_step(train_config(), line, 'dense')


@pytest.fixture(scope='module')
def planned(v5e, line, compiled):
  config = train_config(mesh_data=1, mesh_latent=4)
  return planner.read(config, v5e, line, compiled)


# Programs whose costs are known.


def module_of(mesh, f, *args, donate=()):
  """A compiled program; args are (shape, dtype) or (shape, dtype, spec)."""

  def abstract(shape, dtype, *spec):
    sharding = NamedSharding(mesh, *spec or (P(),))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  with jax.set_mesh(mesh):
    lowered = jax.jit(f, donate_argnums=donate).lower(
      *(abstract(*arg) for arg in args)
    )
  with tempfile.TemporaryDirectory() as folder:
    lowered.compile(compiler_options={'xla_dump_to': folder})
    return hlo.parse(footprint._dumped(folder))


def costs_of(mesh, f, *args, donate=(), branch=0):
  module = module_of(mesh, f, *args, donate=donate)
  return program.costs(module, lambda by_dead, branches: branch)


def product(a, b):
  return a @ b


def test_a_product_is_2mkn_and_each_matrix_once(line):
  total = costs_of(
    line, product, ((512, 1024), BF16), ((1024, 2048), BF16)
  ).total
  assert total.flops == total.mxu_flops == 2 * 512 * 1024 * 2048
  bytes_each = 512 * 1024, 1024 * 2048, 512 * 2048
  assert total.hbm_bytes == 2 * sum(bytes_each)


@pytest.mark.parametrize(
  ('precision', 'passes'), [('highest', 6), ('high', 3), ('default', 1)]
)
def test_products_of_float32_take_several_passes(line, precision, passes):
  def f(a, b):
    return jnp.einsum('bij,bjk->bik', a, b, precision=precision)

  total = costs_of(line, f, ((8, 256, 128), F32), ((8, 128, 512), F32)).total
  assert total.flops == 2 * 8 * 256 * 128 * 512
  assert total.mxu_flops == passes * total.flops


def step(x_II, w_II):
  return jnp.tanh(x_II @ w_II)


SQUARE = ((256, 256), BF16)


@pytest.mark.parametrize(
  ('loop', 'runs'),
  [
    (lambda x, w: jax.lax.fori_loop(3, 10, lambda i, x: step(x, w), x), 7),
    (
      lambda x, w: jax.lax.fori_loop(
        0, 3, lambda i, x: jax.lax.fori_loop(0, 4, lambda j, x: step(x, w), x),
        x,
      ),
      12,
    ),
  ],
)  # fmt: skip
def test_bodies_of_loops_count_as_often_as_they_run(line, loop, runs):
  found = costs_of(line, loop, SQUARE, SQUARE)
  assert found.total.flops == runs * 2 * 256**3
  assert not found.endless


def test_control_the_compilers_own_count_takes_a_loop_for_one_run(line):
  def f(x, w):
    return jax.lax.fori_loop(0, 50, lambda i, x: step(x, w), x)

  x = jax.ShapeDtypeStruct(*SQUARE, sharding=NamedSharding(line, P()))
  with jax.set_mesh(line):
    counted = jax.jit(f).lower(x, x).compile().cost_analysis()['flops']
  assert counted < 3 * 2 * 256**3
  assert costs_of(line, f, SQUARE, SQUARE).total.flops == 50 * 2 * 256**3


def test_a_scan_reads_a_row_at_a_time(line):
  def scan(x, w):
    return jax.lax.scan(lambda x, w: (step(x, w), None), x, w)[0]

  module = module_of(line, scan, SQUARE, ((1000, 256, 256), BF16))
  found = program.costs(module, lambda *_: 0).total
  assert found.flops == 1000 * 2 * 256**3
  # The weights once, 131 MB: what a step takes may stay in VMEM.
  assert 1 <= found.hbm_bytes / (1000 * 2 * 256**2) < 1.1
  # Control: the whole stack at every step, as operands' sizes alone say.
  whole = sum(
    shape.hbm_bytes
    for computation in module.computations.values()
    for instruction in computation.instructions.values()
    if instruction.opcode == 'fusion'
    for shape in computation.operand_shapes(instruction)
  )
  assert whole * 1000 > 100 * found.hbm_bytes


def test_a_loop_of_unknown_length_is_left_out_and_told(line):
  def f(x, w, n):
    return step(jax.lax.fori_loop(0, n, lambda i, x: step(x, w), x), w)

  found = costs_of(line, f, SQUARE, SQUARE, ((), I32))
  assert found.total.flops == 2 * 256**3
  (left_out,) = found.endless.values()
  assert left_out.total.flops == 2 * 256**3


def test_the_branch_that_is_chosen_counts(line):
  def f(x, i):
    return jax.lax.switch(
      i, [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x @ x], x
    )

  for branch, products in ((0, 0), (1, 1), (2, 3)):
    found = costs_of(line, f, SQUARE, ((), I32), branch=branch)
    assert found.total.flops == products * 2 * 256**3
    (choice,) = found.branches
    each = [one.total.flops / (2 * 256**3) for one in choice.costs]
    assert each == [0, 1, 3] and choice.chosen == branch


# Of 1 GiB, which VMEM can't hold: a small table is read whole.
TABLE = ((2**20, 256), F32)


def test_rows_alone_are_read_and_written(line):
  row = 256 * 4
  read = costs_of(line, lambda t, i: t[i], TABLE, ((512,), I32)).total
  assert read.hbm_bytes == 2 * 512 * row + 512 * 4

  def put(t, u, i):
    return jax.lax.dynamic_update_slice(t, u, (i, 0))

  rows = ((64, 256), F32)
  put = costs_of(line, put, TABLE, rows, ((), I32), donate=0).total
  assert 0 <= put.hbm_bytes - 2 * 64 * row < 1024
  add = costs_of(
    line, lambda t, u, i: t.at[i].add(u), TABLE, rows, ((64,), I32), donate=0
  ).total
  assert 0 <= add.hbm_bytes - 3 * 64 * row < 1024
  # Control: where the table is kept, it is copied.
  copied = costs_of(
    line, lambda t, u, i: t.at[i].add(u), TABLE, rows, ((64,), I32)
  ).total
  assert copied.hbm_bytes >= 2 * 2**30


@pytest.mark.parametrize('topology', ['v5e:2x2', 'tpu7x:2x2x1'])
def test_exchanges_are_found_with_their_bytes_and_groups(topology):
  slices = chips.find(topology)
  n = len(slices.devices)
  mesh = splits.make_mesh(slices, 1, n)

  def f(x):
    return (
      jax.lax.psum(x, 'latent'),
      jax.lax.all_gather(x * 2, 'latent', tiled=True),
      jax.lax.psum_scatter(x * 3, 'latent', tiled=True),
      jax.lax.all_to_all(x * 4, 'latent', 0, 0, tiled=True),
      jax.lax.ppermute(x * 5, 'latent', [(i, (i + 1) % n) for i in range(n)]),
    )

  spec = P('latent')
  shards = jax.shard_map(
    f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
  )
  found = costs_of(mesh, shards, ((n * 2048, 1024), F32, spec))
  size = 2048 * 1024 * 4
  counts = {one.kind: tuple(v) for one, v in found.collectives.items()}
  assert counts == {
    'all-reduce': (1, size),
    'all-gather': (1, size),
    'reduce-scatter': (1, size),
    'all-to-all': (1, size),
    'collective-permute': (1, size),
  }
  times = roofline.roofline(found, slices, mesh).exchanges
  sent = {one.kind: one.link_bytes / size for one in times}
  assert sent == {
    'all-reduce': 2 * (n - 1) / n,
    'all-gather': n - 1,
    'reduce-scatter': (n - 1) / n,
    'all-to-all': (n - 1) / n,
    'collective-permute': 1,
  }


def test_exchanges_in_a_loop_and_along_one_axis(v5e):
  mesh = splits.make_mesh(v5e, 2, 2)

  def f(x):
    def body(i, x):
      return jax.lax.psum(jnp.sin(x), 'data')

    return jax.lax.fori_loop(0, 6, body, x)

  spec = P('data', 'latent')
  shards = jax.shard_map(
    f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
  )
  found = costs_of(mesh, shards, ((1024, 512), F32, spec))
  ((one, (count, size)),) = found.collectives.items()
  assert one.kind == 'all-reduce' and one.group == (0, 2)
  assert (count, size) == (6, 6 * 512 * 256 * 4)
  (time,) = roofline.roofline(found, v5e, mesh).exchanges
  assert time.axis == 'data' and time.over == 'ICI'


def test_exchanges_between_slices_go_over_the_network():
  slices = chips.find('v6e:2x2', 2)
  mesh = splits.make_mesh(slices, 4, 2)
  spec = P(('data', 'latent'))
  shards = jax.shard_map(
    lambda x: jax.lax.psum(jnp.sin(x), 'data'),
    mesh=mesh,
    in_specs=spec,
    out_specs=P('latent'),
  )
  found = costs_of(mesh, shards, ((8 * 2048, 512), F32, spec))
  times = roofline.roofline(found, slices, mesh).exchanges
  over = {one.over: one for one in times}
  size = 2048 * 512 * 4
  # Two chips of a slice share the sum, half of it each goes to the other.
  network = over['DCN']
  assert network.kind == 'between slices: all-reduce'
  assert network.put_in_bytes == size / 2
  assert network.seconds == pytest.approx(size / 2 / 12.5e9)
  assert over['ICI'].put_in_bytes > 0


def kernel_call(cost):
  def kernel(x, out):
    out[...] = x[...] * 2

  return lambda x: pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    cost_estimate=cost,
    name='twice',
  )(x)


def test_kernels_count_by_what_they_declare():
  slices = chips.find('v6e:1x1')
  mesh = splits.make_mesh(slices, 1, 1)
  declared = pl.CostEstimate(flops=12345, transcendentals=0, bytes_accessed=678)
  for cost in (declared, None):
    x = ((1024, 1024), F32)
    found = costs_of(mesh, kernel_call(cost), x)
    ((kernel, calls),) = found.kernels.items()
    assert kernel.name == 'twice' and calls == 1
    if cost:
      assert (kernel.flops, kernel.hbm_bytes) == (12345, 678)
    else:
      # Its operand and result.
      assert kernel.flops == 0 and kernel.hbm_bytes == 2 * 2**22
    assert kernel.declared == bool(cost)


# Text.


@pytest.mark.fast
@pytest.mark.parametrize(
  ('groups', 'first'),
  [
    ('{{0,2},{1,3}}', (0, 2)),
    ('[2,4]<=[8]', (0, 1, 2, 3)),
    ('[4,2]<=[2,4]T(1,0)', (0, 4)),
    ("mesh['a'=2,'b'=4] {'a'}", (0, 4)),
    ("mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
    ("mesh['a'=2,'b'=4] {'a','b'}", tuple(range(8))),
    ('{}', ()),
  ],
)
def test_groups_are_read_in_every_notation(groups, first):
  text = (
    f'  %a = f32[8]{{0}} all-reduce(%x), replica_groups={groups}, '
    'use_global_device_ids=true, to_apply=%add'
  )
  read = exchange.read(hlo._instruction(text), 'part')
  assert read == exchange.Collective('all-reduce', first, 'part')


@pytest.mark.fast
@pytest.mark.parametrize(
  ('text', 'nbytes', 'space'),
  [
    ('f32[100,3]{1,0:T(8,128)}', 104 * 128 * 4, 0),
    ('f32[100,3]{0,1:T(8,128)S(1)}', 8 * 128 * 4, 1),
    ('bf16[100,256]{1,0:T(8,128)(2,1)}', 104 * 256 * 2, 0),
    ('s32[1000]{0:T(1024)}', 4096, 0),
    ('pred[5]{0}', 5, 0),
    ('s4[10]{0}', 5, 0),
    ('c64[3]{0}', 24, 0),
  ],
)
def test_shapes_have_the_bytes_of_their_tiles(text, nbytes, space):
  (shape,) = hlo.shapes(text)
  assert (shape.nbytes, shape.space) == (nbytes, space)
  assert shape.hbm_bytes == (0 if space else nbytes)


@pytest.mark.fast
def test_an_instruction_with_all_there_is():
  body = 'a(b"c\\"d,e='
  read = hlo._instruction(
    '  ROOT %c.1 = (f32[2,3]{1,0:T(8,128)}, /*index=1*/s32[]{:T(128)S(6)}) '
    'custom-call(%a, %b.2), custom_call_target="tpu_custom_call", '
    'metadata={op_name="jit(f)/g" stack_frame_id=3}, backend_config='
    + json.dumps({'body': body, 'x': {'y': '7'}})
  )
  assert read.name == 'c.1' and read.root and read.opcode == 'custom-call'
  assert list(map(str, read.shapes)) == ['f32[2,3]', 's32[]']
  assert read.operands == ('a', 'b.2')
  assert read.attribute('custom_call_target') == '"tpu_custom_call"'
  assert read.backend_config == {'body': body, 'x': {'y': '7'}}
  assert read.attribute('calls') == ''


@pytest.mark.fast
def test_no_program_is_an_error():
  with pytest.raises(ValueError, match='no program'):
    hlo.parse('HloModule nothing\n')


# Chips.


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
  with pytest.raises(UserError, match=re.escape(part)):
    chips.find(topology)


def test_every_small_slice_that_is_named_can_be_compiled_for():
  for chip in chips.CHIPS:
    for shape in chips.offered(chip)[:4]:
      found = chips.find(chips.name(chip, shape))
      per_chip = 2 if chip == 'tpu7x' else 1
      assert found.devices_per_chip == per_chip
      assert len(found.devices) == per_chip * math.prod(shape)


@pytest.mark.fast
@pytest.mark.parametrize(
  ('chip', 'wanted', 'shape'),
  [
    ('v6e', 5, (2, 4)),
    ('v6e', 999, (16, 16)),
    ('v5p', 64, (4, 4, 4)),
    ('v5p', 512, (8, 8, 8)),
    ('v5p', 65, (4, 4, 8)),
  ],
)
def test_the_nearest_slice_is_compact(chip, wanted, shape):
  assert chips.nearest(chip, wanted) == shape


@pytest.mark.parametrize('chip', chips.CHIPS)
def test_the_room_in_hbm_is_what_the_compiler_says(chip):
  slices = chips.find(chips.name(chip, chips.offered(chip)[1]))
  mesh = splits.make_mesh(slices, 0, 1)
  x = jax.ShapeDtypeStruct(
    (len(slices.devices), 2**18, 2**18), BF16,
    sharding=NamedSharding(mesh, P('data')),
  )  # fmt: skip
  with pytest.raises(jax.errors.JaxRuntimeError) as error:
    jax.jit(jnp.sin).lower(x).compile()
  room = re.search(r'available HBM \(([\d.]+)G\)', str(error.value))
  assert slices.device.hbm_gib == pytest.approx(float(room[1]), abs=0.01)
  # The array and its sine, of all that the compiler counts.
  assert footprint._needed(str(error.value)) == 2 * 2**37


# The roofline, by hand.


def test_times_are_those_of_the_slower_of_products_and_memory(v5e, line):
  costs = program.Costs(
    parts={
      'a': program.Work(1, 197e12, 819e9 / 2),
      'b': program.Work(1, 197e12 / 4, 819e9 * 2),
    }
  )
  costs.collectives[exchange.Collective('all-reduce', (), 'a')] = np.array(
    [3, 200e9]
  )
  found = roofline.roofline(costs, v5e, line)
  seconds = {part.name: part.seconds for part in found.parts}
  assert seconds == {'a': 1, 'b': 2}
  assert found.exchanges_s == pytest.approx(2 * 3 / 4)
  assert found.step_s == 3
  assert found.without_overlap_s == pytest.approx(3 + 1.5)


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
  slices = chips.find('v6e:16x16')
  mesh = splits.make_mesh(slices, data, latent)
  seconds = roofline.link_seconds(kind, 1.0, mesh.devices[0], slices)
  assert seconds == pytest.approx(want)


def test_devices_share_their_chip():
  slices = chips.find('tpu7x:2x2x1')
  assert slices.device.flops == chips.CHIPS['tpu7x'].flops / 2
  assert slices.hbm_limit == pytest.approx(94.74 * 2**30)


# The training step.


def test_memory_has_its_parts(planned):
  held = planned.footprint
  weights = 2 * S * D * 4 + S * 4 + D * 4
  # The mean and scale of the data are not trained.
  assert held.parameters == weights + D * 4 + 4
  assert held.moments == 2 * weights + 4
  assert held.average == weights + 4
  assert held.counters == S * 4 + 3 * 4
  assert held.batch == B * D * 2
  assert held.temporaries > 0 and held.program > 0
  # The compiler's arguments are these, but for tiles of small ones.
  assert 0 <= held.padding < 0.02 * held.arguments
  assert planned.fits and held.total < planned.slices.hbm_limit


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
    .costs.parts.get(parts.AUXK, program.Work())
    .flops
    for dead in planner.DEAD
  }
  assert flops['none'] == 0 < flops['few'] < flops['all']
  assert planned.costs.parts[parts.AUXK].flops == flops['few']
  assert list(planned.auxk_s) == sorted(planned.auxk_s)
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
  assert program.buffers(module, 64 * 2048)
  assert not program.buffers(module, 512 * 2048)


def test_figures_are_for_json_and_for_reading(planned):
  whole = dataclasses.replace(planned, tokens=10**12, price_per_chip_hour=2.0)
  found = json.loads(json.dumps(whole.to_dict()))
  assert found['measured'] is False and found['fits'] is True
  per_chip = sum(found['hbm_parts_per_chip_gib'].values())
  assert found['hbm_per_chip_gib'] == pytest.approx(per_chip)
  parts_s = sum(p['seconds'] for p in found['roofline_parts'].values())
  links_s = sum(one['seconds'] for one in found['exchanges'])
  assert found['roofline_step_s'] == pytest.approx(max(parts_s, links_s))
  rate = B / found['roofline_step_s']
  assert found['tokens_per_s_at_most'] == pytest.approx(rate)
  assert found['hours_at_least'] == pytest.approx(10**12 / rate / 3600)
  assert found['cost_at_least'] == pytest.approx(
    found['hours_at_least'] * 4 * 2.0
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
  found = plan_lib.plan(big, 'v5e:1x1', compiles=1, report=lines.append)
  assert not found.fits and found.roofline.step_s > 0
  needs, room = found.footprint.total, found.slices.hbm_limit
  # Parameters, moments, average and gradients are 20 GiB.
  assert room < 16 * 2**30 and needs > 20 * 2**30
  text = '\n'.join(table.lines(found))
  assert f'{(needs - room) / 2**30:.2f} GiB too much' in text
  first = found.remedies[0]
  assert first.compiled and first.flags.startswith('--topology=v5e:2x2 --mesh')
  assert first.hbm_bytes < room and first.flags in text
  others = [remedy for remedy in found.remedies if not remedy.compiled]
  assert others and 'by arithmetic, not compiled' in text
  # Fewer tokens at a time would not do: there are few of them.
  assert not any('micro' in remedy.flags for remedy in found.remedies)


def test_fewer_tokens_at_a_time_are_proposed_where_they_help(v5e, line):
  config = train_config(
    sae=SaeConfig(d_model=D, n_latents=2**18, k=8),
    batch_size=2**17,
    mesh_data=1,
    mesh_latent=4,
  )
  held = footprint.arguments(config, line)
  needs = dataclasses.replace(held, temporaries=20 * 2**30)
  found = remedies.find(config, v5e, needs, None, 0, print)
  assert found[0].flags == '--micro_batches=2' and not found[0].compiled
  # Of tokens alone, so that half of them takes half of it.
  assert 9 * 2**30 < found[0].hbm_bytes < 13 * 2**30


@pytest.mark.parametrize(
  ('config', 'mesh', 'part'),
  [
    (
      train_config(sae=SaeConfig(d_model=D, n_latents=4097, k=8)), (1, 4),
      'n_latents 4,097 can not be split evenly over 4 shards: use --n=4096',
    ),
    (
      train_config(batch_size=1023), (4, 1),
      'use --batch=1024',
    ),
    (
      train_config(batch_size=1000, micro_batches=3), (2, 2),
      'over 2 shards and 3 micro-batches: use --batch=1002',
    ),
    (train_config(), (1, 5), 'mesh 1x5 needs 5 devices, there are 4: use'),
    (train_config(sae=SaeConfig(k=8)), (1, 4), 'd_model 0'),
    (
      train_config(
        batch_size=511, sae=SaeConfig(d_model=D, n_latents=4097, k=8)
      ),
      'auto',
      'use --batch=512',
    ),
  ],
)  # fmt: skip
def test_uneven_splits_name_the_nearest_even_one(config, mesh, part):
  with pytest.raises(UserError, match=re.escape(part)):
    plan_lib.plan(config, 'v5e:2x2', mesh=mesh)


def test_a_mesh_that_does_not_lie_on_the_torus_names_one(monkeypatch):
  slices = chips.find('v6e:4x4')
  real = splits.mesh_lib.make_mesh

  def refuses(data, latent, devices):
    if latent == 8:
      raise NotImplementedError('Failed to find assignment')
    return real(data, latent, devices)

  monkeypatch.setattr(splits.mesh_lib, 'make_mesh', refuses)
  with pytest.raises(UserError, match='links of v6e:4x4: use --mesh=1x16'):
    splits.make_mesh(slices, 2, 8)
  config = train_config()
  assert (2, 8) not in splits.candidates(config, slices)


def test_splits_are_ranked_and_compiled_ones_are_told_from_guesses(monkeypatch):
  """Compiles nothing: the compiler's part is the other tests'."""
  slices = chips.find('v5e:2x2')
  seen = []

  def compile_step(config, mesh, implementation):
    seen.append((config.mesh_data, config.mesh_latent))
    text = 'ENTRY %m (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n'
    slow = 'f32[2048,1024]{1,0}' * (config.mesh_latent == 4) or 'f32[8]{0}'
    text += f'  ROOT %c = {slow} copy(%p)\n}}\n'
    held = footprint.arguments(config, mesh)
    return footprint.Compiled(text, held, fits=config.mesh_latent > 1)

  monkeypatch.setattr(footprint, 'compile_step', compile_step)
  found = plan_lib.plan(train_config(), slices.name, compiles=2)
  assert len(seen) == 2 and len(found.splits) == 3
  assert [split.compiled for split in found.splits] == [True, True, False]
  every = plan_lib.plan(train_config(), slices.name, compiles=9)
  order = [(split.data, split.latent) for split in every.splits]
  # The slow one comes second, the one that does not fit last.
  assert order == [(2, 2), (1, 4), (4, 1)]
  assert (every.config.mesh_data, every.config.mesh_latent) == (2, 2)


def test_a_step_that_refuses_a_config_says_what_it_takes(monkeypatch):
  real = remedies.step.lowered

  def refuses(config, *args):
    if config.micro_batches < 4:
      raise UserError('too many pairs: use a smaller batch')
    return real(config, *args)

  monkeypatch.setattr(remedies.step, 'lowered', refuses)
  with pytest.raises(UserError) as error:
    plan_lib.plan(train_config(batch_size=2**12), 'v5e:2x2', mesh=(2, 2))
  assert str(error.value) == (
    'mesh 2x2: too many pairs: use a smaller batch '
    '(--micro_batches=4 is accepted)'
  )


# The binary.


def run(*flags):
  return subprocess.run(
    [sys.executable, '-m', 'sae_jax.cli.plan', *flags],
    capture_output=True,
    text=True,
    env=os.environ | {'TF_CPP_MIN_LOG_LEVEL': '3'},
  )


@pytest.mark.slow
def test_the_binary_prints_a_table_and_writes_json_and_hlo(tmp_path):
  out, text = tmp_path / 'plan.json', tmp_path / 'step.txt'
  done = run(
    '--topology=v5e:2x2', '--num_slices=1', '--d=256', '--n=2048', '--k=8',
    '--batch=256', '--k_aux=0', '--mesh=auto', '--tokens=1000000',
    '--price_per_chip_hour=1.2', f'--json={out}', f'--emit_hlo={text}',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith('nothing here was measured')
  found = json.loads(out.read_text())
  assert {'fits', 'hbm_per_chip_gib', 'roofline_step_s'} <= set(found)
  assert found['config']['sae']['n_latents'] == 2048
  assert hlo.parse(text.read_text()).entry.instructions
  wrong = run('--topology=v6e:3x3', '--d=256')
  assert wrong.returncode == 2 and wrong.stdout == ''
  assert wrong.stderr.strip().endswith('use v6e:4x4')
