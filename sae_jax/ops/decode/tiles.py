"""Sizes of the decoding kernels' blocks on a chip."""

import dataclasses

from jax.experimental import pallas as pl

from sae_jax import errors
from sae_jax.ops import chip, row_copies
from sae_jax.ops.chip import SMEM_BYTES

# Real rows that a block should have. The compiler's estimate (no time was
# measured) of cycles a row at D 768, in blocks of 256, 512, 1,024 and 2,048:
# 11.5, 8.2, 8.1 and 8.0 on v5e; 7.4, 6.9, 6.8 and 6.7 on v6e; on each of the
# two cores of v5p as on v6e. HBM needs 5.6, 3.3 and 3.9. At D 4,096 any will
# do: 512 rows take 12.5 cycles each on v5e, where HBM needs 30.
_ROWS = 1024
# A step takes no less than the latency of a copy, some 450 to 900 cycles by
# the same estimate, however few slots are real. With 256 tokens of 768 it
# takes 1,180 on v6e and 1,750 on v5e at 32 real slots, and HBM alone 840 and
# 1,440 to write the block.
_MOST_TOKENS = 256
_LEAST_TOKENS = 8
# Share of VMEM for these kernels; XLA has the rest. If a block's slots fit into
# it they are one chunk, since every chunk, even of empty slots, is a step.
_VMEM_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a kernel over blocks of slots is laid out.

  Attributes:
    block_tokens: tokens of a block.
    chunks: steps that a block takes.
    slots: of a chunk, a multiple of `row_copies.PART`.
    cores: TensorCores that share the blocks.
    vmem_bytes: what the kernel may use.
  """

  block_tokens: int
  chunks: int
  slots: int
  cores: int
  vmem_bytes: int


def choose(
  n_blocks: int, n_slots: int, d_model: int, block_tokens: int
) -> Layout:
  """The layout for G blocks of R slots.

  Raises:
    UserError: if a block does not fit the chip's memories.
  """
  vmem = chip.vmem_bytes()
  room = _VMEM_SHARE * vmem - _fixed_bytes(d_model, block_tokens)
  parts = max(1, int(room / (2 * 4 * d_model * row_copies.PART)))
  chunk_slots = parts * row_copies.PART
  chunks = pl.cdiv(n_slots, chunk_slots)
  slots = row_copies.whole_parts(pl.cdiv(n_slots, chunks))
  chunks = pl.cdiv(n_slots, slots)
  if 4 * n_blocks * chunks > SMEM_BYTES:
    raise errors.UserError(
      f'{n_blocks} blocks of {block_tokens} tokens take {chunks} steps each, '
      f'more than {SMEM_BYTES // 4}: use larger blocks or fewer tokens'
    )
  need = 2 * 4 * d_model * slots + _fixed_bytes(d_model, block_tokens)
  if need > vmem:
    raise errors.UserError(
      f'a block of {block_tokens} tokens at d_model {d_model} takes {need} '
      f'bytes of VMEM and there are {vmem}: use smaller blocks'
    )
  return Layout(
    block_tokens=block_tokens,
    chunks=chunks,
    slots=slots,
    cores=min(chip.cores(), n_blocks),
    vmem_bytes=need,
  )


def _fixed_bytes(d_model, block_tokens):
  """All but the buffers: two blocks of tokens, and a product's factors."""
  return 4 * d_model * (3 * block_tokens + 2 * row_copies.PART) + 2**20


def block_tokens(batch: int, d_model: int, k: int, active: float = 1.0) -> int:
  """Tokens of a block.

  Args:
    batch: tokens. A block has fewer than twice as many.
    d_model: width of a row.
    k: slots of a token.
    active: the share of them that is expected to be real.
  """
  vmem = chip.vmem_bytes()
  tokens = _LEAST_TOKENS
  while tokens < min(batch, _MOST_TOKENS) and 2 * tokens * k * active <= _ROWS:
    wider = 2 * tokens
    buffers = 2 * 4 * d_model * row_copies.whole_parts(wider * k)
    if buffers + _fixed_bytes(d_model, wider) > _VMEM_SHARE * vmem:
      break
    tokens = wider
  return tokens
