"""Programs of known cost are read rightly."""

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from sae_jax.plan import meshes, roofline
from sae_jax.plan.program import costs
from sae_jax.tpu import slices as slices_lib
from tests.support.programs import costs_of, module_of, product

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32


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
  work = costs_of(line, loop, SQUARE, SQUARE)
  assert work.total.flops == runs * 2 * 256**3
  assert not work.endless


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
  work = costs.costs(module, lambda *_: 0).total
  assert work.flops == 1000 * 2 * 256**3
  # The weights once, 131 MB: what a step takes may stay in VMEM.
  assert 1 <= work.hbm_bytes / (1000 * 2 * 256**2) < 1.1
  # Control: the whole stack at every step, as operands' sizes alone say.
  whole = sum(
    shape.hbm_bytes
    for computation in module.computations.values()
    for instruction in computation.instructions.values()
    if instruction.opcode == 'fusion'
    for shape in computation.operand_shapes(instruction)
  )
  assert whole * 1000 > 100 * work.hbm_bytes


def test_a_loop_of_unknown_length_is_left_out_and_told(line):
  def f(x, w, n):
    return step(jax.lax.fori_loop(0, n, lambda i, x: step(x, w), x), w)

  work = costs_of(line, f, SQUARE, SQUARE, ((), I32))
  assert work.total.flops == 2 * 256**3
  (left_out,) = work.endless.values()
  assert left_out.total.flops == 2 * 256**3


def test_the_branch_that_is_chosen_counts(line):
  def f(x, i):
    return jax.lax.switch(
      i, [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x @ x], x
    )

  for branch, products in ((0, 0), (1, 1), (2, 3)):
    work = costs_of(line, f, SQUARE, ((), I32), branch=branch)
    assert work.total.flops == products * 2 * 256**3
    (choice,) = work.branches
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
  slices = slices_lib.find(topology)
  n = len(slices.devices)
  mesh = meshes.make_mesh(slices, 1, n)

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
  work = costs_of(mesh, shards, ((n * 2048, 1024), F32, spec))
  size = 2048 * 1024 * 4
  counts = {one.kind: tuple(v) for one, v in work.collectives.items()}
  assert counts == {
    'all-reduce': (1, size),
    'all-gather': (1, size),
    'reduce-scatter': (1, size),
    'all-to-all': (1, size),
    'collective-permute': (1, size),
  }
  times = roofline.roofline(work, slices, mesh).exchanges
  sent = {one.kind: one.link_bytes / size for one in times}
  assert sent == {
    'all-reduce': 2 * (n - 1) / n,
    'all-gather': n - 1,
    'reduce-scatter': (n - 1) / n,
    'all-to-all': (n - 1) / n,
    'collective-permute': 1,
  }


def test_exchanges_in_a_loop_and_along_one_axis(v5e):
  mesh = meshes.make_mesh(v5e, 2, 2)

  def f(x):
    def body(i, x):
      return jax.lax.psum(jnp.sin(x), 'data')

    return jax.lax.fori_loop(0, 6, body, x)

  spec = P('data', 'latent')
  shards = jax.shard_map(
    f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
  )
  work = costs_of(mesh, shards, ((1024, 512), F32, spec))
  ((one, (count, size)),) = work.collectives.items()
  assert one.kind == 'all-reduce' and one.group == (0, 2)
  assert (count, size) == (6, 6 * 512 * 256 * 4)
  (time,) = roofline.roofline(work, v5e, mesh).exchanges
  assert time.axis == 'data' and time.over == 'ICI'


def test_exchanges_between_slices_go_over_the_network():
  slices = slices_lib.find('v6e:2x2', 2)
  mesh = meshes.make_mesh(slices, 4, 2)
  spec = P(('data', 'latent'))
  shards = jax.shard_map(
    lambda x: jax.lax.psum(jnp.sin(x), 'data'),
    mesh=mesh,
    in_specs=spec,
    out_specs=P('latent'),
  )
  work = costs_of(mesh, shards, ((8 * 2048, 512), F32, spec))
  times = roofline.roofline(work, slices, mesh).exchanges
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
  slices = slices_lib.find('v6e:1x1')
  mesh = meshes.make_mesh(slices, 1, 1)
  declared = pl.CostEstimate(flops=12345, transcendentals=0, bytes_accessed=678)
  for cost in (declared, None):
    x = ((1024, 1024), F32)
    work = costs_of(mesh, kernel_call(cost), x)
    ((kernel, calls),) = work.kernels.items()
    assert kernel.name == 'twice' and calls == 1
    if cost:
      assert (kernel.flops, kernel.hbm_bytes) == (12345, 678)
    else:
      # Its operand and result.
      assert kernel.flops == 0 and kernel.hbm_bytes == 2 * 2**22
    assert kernel.declared == bool(cost)
