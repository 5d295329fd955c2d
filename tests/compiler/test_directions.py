"""Votes and neighbours compiled for a pod of 256 chips."""

import tempfile

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from sae_jax import mesh as mesh_lib
from sae_jax.plan import footprint
from sae_jax.plan.program import costs
from sae_jax.plan.program import text as text_lib
from sae_jax.probing import lens, neighbours, row_blocks
from sae_jax.subject import logit_lens
from sae_jax.tpu import aot
from tests.support import programs

N, D, V, SHARDS = 2**24, 768, 50_257, 256


@pytest.fixture(scope='module')
def pod():
  return aot.mesh('v5e:16x16', 1, SHARDS)


@pytest.fixture(scope='module')
def w_dec_ND(pod):
  latents = mesh_lib.sharding(pod, 'ND')
  return jax.ShapeDtypeStruct((N, D), jnp.float32, sharding=latents)


def whole(pod, shape, dtype=jnp.float32):
  everywhere = NamedSharding(pod, P())
  return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)


def compiled(program, *args):
  """Its costs, its memory beside the arguments in MiB, and its text."""
  with tempfile.TemporaryDirectory() as folder:
    binary = program.lower(*args).compile(
      compiler_options={'xla_dump_to': folder, **programs.QUICKLY}
    )
    module = text_lib.parse(footprint._dumped(folder))
  beside = binary.memory_analysis().temp_size_in_bytes / 2**20
  return costs.costs(module, lambda *_: 0), beside, binary.as_text()


def test_rows_go_round_and_are_nowhere_whole(pod, w_dec_ND):
  blocks = row_blocks.blocks_of(w_dec_ND, neighbours._MOST_OTHERS)
  call = whole(pod, (), jnp.int32)
  cost, beside, text = compiled(neighbours._nearest, 5, blocks, w_dec_ND, call)
  assert 'collective-permute' in text and 'all-gather' not in text
  # Its own unit rows, those that it has and those that come: 192 MiB each.
  assert 3 * 192 < beside < 1200
  rows = blocks.rows * blocks.per_call
  assert rows * blocks.calls == N // SHARDS
  assert cost.total.flops == 2 * rows * N * D
  # Products of float32 at full precision.
  assert cost.total.mxu_flops == 6 * cost.total.flops
  # A minute of a pod.
  assert blocks.calls * cost.total.mxu_flops / 197e12 < 60


def test_votes_hold_a_block_of_logits(pod, w_dec_ND):
  unembedding = whole(pod, (V, D))
  between = logit_lens.Lens(None, None, whole(pod, (D,)), unembedding, True)
  blocks = row_blocks.blocks_of(w_dec_ND, V)
  _, beside, text = compiled(
    lens._strongest,
    10,
    blocks,
    between,
    whole(pod, (V,), jnp.bool_),
    w_dec_ND,
    whole(pod, (), jnp.int32),
  )
  assert 'all-gather' not in text
  assert blocks.rows * V * 4 < 128 * 2**20
  assert beside < 1000
