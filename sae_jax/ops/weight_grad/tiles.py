"""Sizes of the weight gradients' blocks."""

import dataclasses
import itertools

from jax.experimental import pallas as pl

from sae_jax import errors
from sae_jax.ops import chip, row_copies

# Pairs of a chunk: the first of these that fits. The compiler's estimate (no
# time was measured) at D 768, both gradients, 64 latents to a block: 7.2 cycles
# a pair in chunks of 256 and 7.0 in chunks of 512 on v6e.
_PAIRS = (512, 256, 128)
# Pairs of (least pairs expected per latent, latents of a block); the first that
# matches is taken. A block takes a step and, since its pairs begin and end
# within a part, a product more than its pairs fill; every product takes as many
# rows as the block has latents. Cycles a pair at D 768 by that estimate, for
# blocks of 64, 128 and 256 latents: with one pair to a latent 19.7, 16.4 and
# 14.0 on v5e, 17.0, 14.4 and 12.9 on a core of v5p, 17.2, 13.6 and 11.1 on v6e;
# with dozens 9.1, 11.1 and 14.1 on v5e, 7.9, 10.0 and 12.3 on v5p, 7.0, 7.6 and
# 9.9 on v6e. HBM needs 16.9, 11.7 and 9.8 with one pair to a latent.
_LATENTS = ((16, 64), (2, 128), (0, 256))
_LEAST_LATENTS = 8
_VMEM_SHARE = 0.5
# Pairs per token from which both tables are packed. Rows of both in one word
# save a copy of 7 cycles a pair, but packing is a pass over the tables: 10
# (v6e) to 17 (v5e) cycles a token of HBM traffic at D 768.
_PACK_FROM = 2


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the kernel over pairs is laid out.

  Attributes:
    pairs: of a chunk, a multiple of `row_copies.PART`.
    latents: of a block, a multiple of 8.
    cores: TensorCores that share the latents.
    vmem_bytes: what the kernel may use.
  """

  pairs: int
  latents: int
  cores: int
  vmem_bytes: int


def packs(n_pairs: int, n_tokens: int) -> bool:
  """Whether packing the rows of two tables pays for a number of pairs."""
  return n_pairs >= _PACK_FROM * n_tokens


def choose(
  n_pairs: int,
  expected: int,
  n_latents: int,
  d_model: int,
  results: int,
  copied: int,
) -> Layout:
  """The layout for P pairs.

  Args:
    n_pairs: P, all that there is room for.
    expected: number of pairs that are expected to be real.
    n_latents: N.
    d_model: width of a row.
    results: number of gradients.
    copied: number of tables from which each pair copies a row.

  Raises:
    UserError: if not even the smallest blocks fit the chip's memories.
  """
  vmem = chip.vmem_bytes()
  largest = next(
    latents for least, latents in _LATENTS if expected >= least * n_latents
  )
  largest = min(largest, pl.cdiv(n_latents, _LEAST_LATENTS) * _LEAST_LATENTS)
  halved = [largest, largest // 2, largest // 4, largest // 8]
  sizes = [n for n in halved if n % _LEAST_LATENTS == 0]
  for share, latents, pairs in itertools.product(
    (_VMEM_SHARE, 1), sizes, _PAIRS
  ):
    need = _vmem_bytes(pairs, latents, d_model, results, copied)
    if need <= share * vmem:
      break
  else:
    raise errors.UserError(
      f'the weight gradients at d_model {d_model} take {need} bytes of VMEM '
      f"and there are {vmem}: use implementation 'gather'"
    )
  pairs = min(pairs, row_copies.whole_parts(n_pairs))
  blocks = pl.cdiv(n_latents, latents)
  scalars = 4 * (
    2 * (blocks + pl.cdiv(n_pairs, pairs)) + n_pairs // row_copies.PART
  )
  if scalars > chip.SMEM_BYTES:
    raise errors.UserError(
      f'{n_pairs} pairs and {n_latents} latents take {scalars} bytes of SMEM, '
      f'more than {chip.SMEM_BYTES}: use a smaller batch or more chips'
    )
  return Layout(
    pairs=pairs,
    latents=latents,
    cores=min(chip.cores(), blocks),
    vmem_bytes=need,
  )


def _vmem_bytes(pairs, latents, d_model, results, copied):
  row = 4 * d_model
  buffers = 2 * copied * pairs * row
  blocks = 2 * results * latents * row
  product = (latents + 2 * row_copies.PART) * row
  return buffers + blocks + product + 2**20
