"""Kernels that move rows, compiled for every chip at real shapes."""

import functools

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import pytest

from sae_jax import mesh as mesh_lib
from sae_jax.ops import shapes
from sae_jax.ops.decode import kernel as decode_kernel
from sae_jax.ops.decode import tiles as decode_tiles
from sae_jax.ops.weight_grad import kernel as grad_kernel
from sae_jax.ops.weight_grad import tiles as grad_tiles
from sae_jax.tpu import aot
from sae_jax.tpu.chips import CHIPS
from tests.support import chip_shapes

BF16 = jnp.bfloat16


@pytest.fixture(scope='module', params=CHIPS)
def chip(request):
  return aot.one_chip(request.param)


def compiled(mesh, function, *args):
  sharding = NamedSharding(mesh, PartitionSpec())
  args = [jax.ShapeDtypeStruct(*a, sharding=sharding) for a in args]
  with jax.set_mesh(mesh):
    return jax.jit(function).lower(*args).compile()


def all_three(shape, tokens, dtype):
  """The three kernels of a training step, and what they are given."""
  slots = shape.batch // tokens, tokens * shape.k
  n_pairs = shape.batch * shape.k
  expected = int(n_pairs * shape.active)

  def run(rows, token, weights, count, latent, row, values, x_BD, g_BD, w_ND):
    common = dict(block_tokens=tokens, dtype=dtype)
    return (
      decode_kernel.gather_sum(rows, token, weights, count, w_ND, **common),
      decode_kernel.sampled_products(rows, token, count, g_BD, w_ND, **common),
      grad_kernel.segment_sums(
        latent, row, (values, values), (g_BD, x_BD), shape.n_latents, count[0],
        dtype=dtype, expected=expected,
      ),
    )  # fmt: skip

  per_slot, per_pair = (slots, jnp.int32), ((n_pairs,), jnp.int32)
  per_token = (shape.batch, shape.d_model), jnp.float32
  return run, (
    per_slot, per_slot, (slots, jnp.float32), (slots[:1], jnp.int32),
    per_pair, per_pair, ((n_pairs,), jnp.float32), per_token, per_token,
    ((shape.n_latents, shape.d_model), jnp.float32),
  )  # fmt: skip


# The narrowest in full precision: the others are sized for what costs.
PRECISION = {'32k': None}


@pytest.mark.parametrize('shape', chip_shapes.named())
def test_chips_run_real_shapes_without_a_copy_of_the_table(chip, shape):
  share = shape.active
  with jax.set_mesh(chip):
    tokens = decode_tiles.block_tokens(
      shape.batch, shape.d_model, shape.k, share
    )
    # Full precision copies two rows for each pair: it must fit as well.
    n_pairs = shape.batch * shape.k
    expected = int(n_pairs * share)
    grad_tiles.choose(n_pairs, expected, shape.n_latents, shape.d_model, 2, 2)
    plan = decode_tiles.choose(
      shape.batch // tokens, tokens * shape.k, shape.d_model, tokens
    )
    assert plan.cores == pltpu.get_tpu_info().num_cores
  run, args = all_three(shape, tokens, PRECISION.get(shape.name, BF16))
  program = compiled(chip, run, *args)
  packed = 4 * shape.batch * shape.d_model
  assert temporary(program) < packed + table_bytes(shape) / 8


def temporary(program):
  return program.memory_analysis().temp_size_in_bytes


def table_bytes(shape):
  return 4 * shape.n_latents * shape.d_model


def test_control_a_copy_of_the_table_is_seen():
  # It would fit v5e's VMEM, where XLA puts what it can.
  shape = shapes.SHAPES[0]
  run, args = all_three(shape, 32, BF16)
  program = compiled(
    aot.one_chip('v5e'), lambda *a: run(*a[:-1], a[-1] * 2)[0], *args
  )
  assert temporary(program) >= table_bytes(shape)


def test_shards_of_odd_sizes_compile():
  line = mesh_lib.make_mesh(1, 2, aot.devices('v5e:2x2')[:2])
  run, args = all_three(shapes.Shape('odd', 80, 384, 500, 24), 16, BF16)

  def shard(*args):
    # Each has pairs and counts of its own.
    args = jax.tree.map(functools.partial(_own, 'latent'), args)
    return jax.lax.psum(run(*args), 'latent')

  spec = PartitionSpec()
  mapped = jax.shard_map(shard, mesh=line, in_specs=spec, out_specs=spec)
  assert compiled(line, mapped, *args)


def _own(axis, array):
  return array + jax.lax.axis_index(axis).astype(array.dtype)
