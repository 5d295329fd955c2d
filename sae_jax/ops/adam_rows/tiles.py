"""How many rows the one-pass kernels take at a time."""

import dataclasses

from sae_jax.ops import chip
from sae_jax.ops.chip import LANES, SUBLANES

# Most elements of one matrix in a group. A row has two sums, one after the
# other, and only other rows of its group can fill the wait: the compiler's
# estimate for groups of 8, 16, 32 and 64 rows at D 768 is 54, 30, 19 and 14
# cycles a row on v6e, where HBM needs 30, and 26, 16, 11 and 9 on v5p, where it
# needs 18. Larger ones take longer to compile.
_GROUP_ELEMENTS = 65_536
_MOST_GROUP = 256
# VMEM for the blocks of all matrices, two of each since the next is fetched
# meanwhile. Blocks of 64, 128, 256 and 512 rows at D 768 are 23, 19, 16 and 15
# cycles a row on v5e by the same estimate (HBM 51), 15, 14, 12 and 12 on v6e
# (30), 9, 9, 8 and 8 on v5p (18): 16 MiB take 256. v4 has 16 MiB in all, half
# of which take 128; the rest is left to XLA and to what a group spills.
_MOST_BLOCKS_BYTES = 2**24
_VMEM_SHARE = 0.5
_SPILLED_BYTES = 2**21


@dataclasses.dataclass(frozen=True)
class Tile:
  """Rows of a kernel's step.

  Attributes:
    block: rows that are moved at a time, a multiple of `group`.
    group: rows that are worked on at a time, a multiple of 8.
    vmem_bytes: what the kernel may use.
  """

  block: int
  group: int
  vmem_bytes: int


def choose(n: int, width: int, matrices: int) -> Tile:
  """The tile of a kernel over rows.

  Args:
    n: rows.
    width: float32 numbers in a row.
    matrices: how many are read or written.
  """
  lanes = -(-width // LANES) * LANES
  rows = -(-n // SUBLANES) * SUBLANES
  group = SUBLANES
  while 2 * group <= min(rows, _MOST_GROUP, _GROUP_ELEMENTS // lanes):
    group *= 2
  row_bytes = 2 * matrices * lanes * 4
  blocks_bytes = min(_VMEM_SHARE * chip.vmem_bytes(), _MOST_BLOCKS_BYTES)
  groups = max(1, int(blocks_bytes / row_bytes / group))
  block = group * min(groups, -(-rows // group))
  return Tile(block, group, block * row_bytes + _SPILLED_BYTES)
