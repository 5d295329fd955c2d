"""Kernels that move rows: shards of the latents add up."""

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from sae_jax import mesh as mesh_lib
from sae_jax.ops.decode import kernel as decode_kernel
from sae_jax.ops.weight_grad import kernel as grad_kernel
from tests.support.row_sums import close, make_small, Slots, traced_anew


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  make_small(monkeypatch)
  with traced_anew():
    yield


def test_shards_of_latents_add_up():
  slots = Slots(8, 40, (40, 21), 20, 128)
  # One shard has the front part of the slots, the other the rest; so that
  # each knows how many pairs it has, and no other.
  fronts = slots.count // 3
  # The plain interpreter of jax 0.10 does not know what varies.
  interpret = pltpu.InterpretParams()

  def run(w_ND):
    first = jax.lax.axis_index('latent') == 0
    count = jnp.where(first, fronts, slots.count - fronts)
    start = jnp.where(first, 0, fronts)[:, None]
    order = (jnp.arange(40) + start) % 40
    rows, token, weights = (
      jnp.take_along_axis(a, order, axis=1)
      for a in (slots.rows, slots.token, slots.weights)
    )
    common = dict(block_tokens=8, interpret=interpret)
    sums = decode_kernel.gather_sum(rows, token, weights, count, w_ND, **common)
    products = decode_kernel.sampled_products(
      rows, token, count, slots.g, w_ND, **common
    )
    real = jnp.arange(40) < count[:, None]
    order = jnp.argsort(jnp.where(real, rows, 20).reshape(-1))
    latent_P = jnp.where(real, rows, 20).reshape(-1)[order]
    row_P = (token + jnp.array([[0], [8]])).reshape(-1)[order]
    weights_P = products.reshape(-1)[order]
    (grad_ND,), _ = grad_kernel.segment_sums(
      latent_P, row_P, [weights_P], [slots.g], 20, count.sum(),
      interpret=interpret,
    )  # fmt: skip
    return jax.lax.psum((sums, grad_ND), 'latent')

  line = mesh_lib.make_mesh(1, 2, jax.devices()[:2])
  spec = PartitionSpec()
  mapped = jax.shard_map(run, mesh=line, in_specs=spec, out_specs=spec)
  sums, grad_ND = jax.jit(mapped)(slots.w)
  want_ND = np.zeros((20, 128))
  pulled = slots.want_products()[..., None] * slots.g[slots.place]
  np.add.at(want_ND, slots.rows[slots.real], pulled[slots.real])
  assert close(sums, slots.want_sums())
  assert close(grad_ND, want_ND)
