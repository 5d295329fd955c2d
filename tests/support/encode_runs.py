"""The encoder's kernel with small blocks."""

import dataclasses
import functools

import jax
import pytest

from sae_jax.ops.encode_topk import exact, kernel
from sae_jax.ops.encode_topk import tiles as tiles_lib
from tests.support.programs import QUICKLY

# Bins of 32 that keep two values each, of 64 latents in a block.
TILES = tiles_lib.Tiles(
  tokens=128,
  bins=32,
  depth=2,
  kept=2,
  group=1,
  rows=64,
  lanes=128,
  unrolled=1,
)
# Each block in four products, two and two in a basic block, for each half of
# the tokens, and of every two neighbours in a bin one alone is offered to it.
GROUPED = dataclasses.replace(
  TILES, tokens=256, depth=4, kept=3, group=2, rows=32, unrolled=2
)


@functools.partial(jax.jit, static_argnames=('k', 'tiles'))
def run(x_BD, w_ND, b_N, mask_N, k, tiles=TILES):
  return exact.encode_topk(x_BD, w_ND, b_N, mask_N, k, None, tiles)


@functools.partial(
  jax.jit, static_argnames=('k', 'tiles'), compiler_options=QUICKLY
)
def run_and_raw(x_BD, w_ND, b_N, mask_N, k, tiles=TILES):
  """What `run` gives, and what the kernel in it gave, from one program."""
  whole, raws = kernel.encode_topk, []

  def encode_topk(*args, **options):
    raws.append(whole(*args, **options))
    return raws[-1]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(kernel, 'encode_topk', encode_topk)
    exact_top_k = exact.encode_topk(x_BD, w_ND, b_N, mask_N, k, None, tiles)
  (raw,) = raws
  return exact_top_k, raw
