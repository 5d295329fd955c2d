"""Sizes of the blocks that the encoder's kernel works in."""

import dataclasses
import itertools
import math

from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from sae_jax import target
from sae_jax.config import UserError
from sae_jax.sparse.encode_topk import select

# Share of tokens that fail the kernel's test, if the winners lie in random
# bins. A token that fails streams the whole encoder once more, so it should
# not happen to most batches of some thousand tokens.
_FAILING = 1e-4
_KEPT = 3
# What an interpreted kernel is laid out for. Lanes set its unit on a TPU.
_TEST_VMEM = 2**26
_TEST_UNIT = 16


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Sizes of the kernel's blocks.

  Attributes:
    tokens: of a block, a multiple of 128.
    bins: that a token's latents fall into: a multiple of 128 on a TPU.
    depth: latents of each bin in a block.
    kept: values that a bin keeps.
    rows: latents of one product: a divisor of bins * depth, and a multiple of
      8 * depth.
    lanes: tokens of one product, a multiple of 128 and a divisor of `tokens`.
  """

  tokens: int
  bins: int
  depth: int
  kept: int
  rows: int
  lanes: int

  def vmem_bytes(self, width: int, k: int, dtype: jnp.dtype) -> int:
    """VMEM that the kernel needs, with double buffers of what streams."""
    size = jnp.dtype(dtype).itemsize
    block = self.bins * self.depth
    streams = 2 * size * width * (self.tokens + block) + 2 * 32 * block
    results = 2 * 4 * self.tokens * (2 * k + 8)
    steps = select.scratch_steps(self.kept * self.bins, k)
    scratch = 4 * self.tokens * (2 * block + 2 * 8 * steps + 8)
    product = 2 * 4 * self.rows * (self.lanes + 128)
    return int(1.1 * (streams + results + scratch + product)) + 2**20


def failing_share(k: int, bins: int, kept: int) -> float:
  """Share of tokens of which some bin holds more than `kept` of the top k.

  For winners in random bins; the bound is the sum over bins of the binomial
  tail, close where it is small.
  """
  chance = 1 / bins
  tail = 1 - sum(
    math.comb(k, held) * chance**held * (1 - chance) ** (k - held)
    for held in range(min(k, kept) + 1)
  )
  return min(1.0, bins * max(tail, 0.0))


def expected_recall(n_latents: int, k: int, bins: int, kept: int) -> float:
  """Share of the top k that bins are expected to keep.

  For winners in random bins, 1 - (bins / k) sum_{r > kept} (r - kept) P(r),
  where P(r) is the hypergeometric chance that r of the k winners are among the
  N / bins latents of a bin (Samaga et al. 2025, arXiv:2506.04165).

  Args:
    n_latents: N.
    k: how many are taken.
    bins: that the latents fall into evenly.
    kept: values that a bin keeps.
  """
  size = n_latents / bins

  def log_choose(a, b):
    return math.lgamma(a + 1) - math.lgamma(b + 1) - math.lgamma(a - b + 1)

  lost = 0.0
  for held in range(kept + 1, min(k, int(size)) + 1):
    if k - held > n_latents - size:
      continue
    chance = math.exp(
      log_choose(k, held)
      + log_choose(n_latents - k, size - held)
      - log_choose(n_latents, size)
    )
    lost += (held - kept) * chance
  return max(0.0, 1 - bins / k * lost)


def choose(
  batch: int,
  width: int,
  n_latents: int,
  k: int,
  dtype: jnp.dtype | None,
  recall: float = 1.0,
) -> Tiles:
  """Tiles for a shape on the chip that is compiled for.

  The fewest bins that seldom fail, then the largest blocks that fit VMEM: the
  encoder streams once for every block of tokens.

  Args:
    batch: tokens.
    width: D.
    n_latents: N.
    k: how many are taken.
    dtype: of the factors.
    recall: below 1, bins and the values that they keep are as few as are
      expected to keep so much of the top k; fewer where those don't fit VMEM,
      so that `expected_recall` of the result says what is kept.

  Raises:
    UserError: if not even the smallest blocks fit.
  """
  factor = jnp.float32 if dtype is None else dtype
  on_tpu = target.platform() == 'tpu'
  vmem = pltpu.get_tpu_info().vmem_capacity_bytes if on_tpu else _TEST_VMEM
  unit = 128 if on_tpu else _TEST_UNIT
  kept, bins = _bins(n_latents, k, unit, recall)
  most = max(128, pl.cdiv(batch, 128) * 128)
  while bins * kept >= k:
    for tokens, depth in itertools.product((1024, 512, 256, 128), (4, 2, 1)):
      tiles = Tiles(
        tokens=tokens,
        bins=bins,
        depth=depth,
        kept=kept,
        rows=_rows(bins, depth, unit),
        lanes=min(tokens, 512),
      )
      fits = tiles.vmem_bytes(width, k, factor) <= 0.9 * vmem
      if fits and tokens <= most:
        return tiles
    # Then more tokens fail, and are computed again.
    bins = bins // 2 // unit * unit
  raise UserError(
    f'k {k} at d_model {width} needs blocks that do not fit the {vmem} bytes '
    "of VMEM: use fewer active latents, or implementation 'gather'"
  )


def _bins(n_latents, k, unit, recall) -> tuple[int, int]:
  """How many values a bin keeps, and the fewest bins that will do."""

  def fewest(kept, enough):
    bins = unit
    while not enough(bins, kept):
      bins += unit
    # Where bins would hold no more than they keep, all of it is kept.
    return min(bins, -(-n_latents // kept // unit) * unit)

  exact = fewest(
    _KEPT, lambda bins, kept: failing_share(k, bins, kept) <= _FAILING
  )
  if recall == 1:
    return _KEPT, exact

  def recalls(bins, kept):
    return kept * bins >= n_latents or (
      kept * bins >= k and expected_recall(n_latents, k, bins, kept) >= recall
    )

  # What a bin keeps costs a comparison for every latent, what all bins keep
  # is sorted in the end.
  for kept in range(1, _KEPT):
    bins = fewest(kept, recalls)
    if kept * bins <= _KEPT * exact:
      return kept, bins
  return _KEPT, min(exact, fewest(_KEPT, recalls))


def _rows(bins: int, depth: int, unit: int) -> int:
  """Latents of one product: a whole block of latents, up to some 2,048.

  A product takes about 100 cycles to fill and drain the MXU (the compiler's
  estimate on v6e at D 768: 267 cycles a token for 32,768 latents in products
  of 256 x 256, 164 of 1,024 x 512, 126 of 1,024 x 1,024; 96 is the least).
  """
  block = bins * depth
  fits = [
    block // parts
    for parts in range(1, bins // 8 + 1)
    if not bins % (8 * parts) and not block % (parts * unit)
  ]
  return next((rows for rows in fits if rows <= 2048), fits[-1])
