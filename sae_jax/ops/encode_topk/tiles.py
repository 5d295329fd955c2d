"""Sizes of the blocks that the encoder's kernel works in."""

import dataclasses
import itertools
import math

from jax.experimental import pallas as pl
import jax.numpy as jnp

from sae_jax import errors
from sae_jax.ops import chip, sorting_network
from sae_jax.ops.chip import LANES, SUBLANES

# Share of tokens that fail the kernel's test, if the winners lie in random
# bins. A token that fails streams the whole encoder once more, so it should
# not happen to most batches of some thousand tokens.
_FAILING = 1e-4
_KEPT = 3
# Share of tokens that may fail since two winners meet in a group. Encoding them
# again costs some 10 times what a token costs the kernel on v6e; a group of two
# saves a fourth of the kernel's cost for every token.
_MEETING = 5e-3
_GROUPS = (4, 2, 1)
# By the compiler's estimate on v6e at D 768, in cycles a token for 32,768
# latents, of which 96 are the product's: 142 with products of 256 latents and
# 256 tokens, 24 in a row, in groups of two. 149 with 128 latents, 153 with 512;
# 152 with 512 tokens, 222 with 128; 154 with 12 in a row. What a product leaves
# in registers must not be much more than fits, and a basic block takes 560
# cycles to get going. Groups of four: 134, none: 190.
_ROWS = _MOST_LANES = 256
_PRODUCTS = 24
_BODY = _PRODUCTS * _ROWS * _MOST_LANES * 768
_TOKENS = (1024, 512, 256, 128)
# Deeper blocks load and store bins less often.
_DEPTHS = (8, 4, 2, 1)
# What an interpreted kernel is laid out for. Lanes set its unit on a TPU.
_TEST_CHIP = 'v5p'
_TEST_UNIT = 16
_TEST_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Sizes of the kernel's blocks.

  Attributes:
    tokens: of a block, a multiple of 128.
    bins: that a token's latents fall into: a multiple of 128 on a TPU.
    depth: latents of each bin in a block, a power of two.
    kept: values that a bin keeps.
    group: latents of a bin of which the largest alone is offered to it, a
      divisor of `depth`.
    rows: latents of one product: a divisor of bins * depth, and a multiple of
      8 * depth.
    lanes: tokens of one product, a multiple of 128 and a divisor of `tokens`.
    unrolled: products of one basic block, a divisor of bins * depth / rows.
  """

  tokens: int
  bins: int
  depth: int
  kept: int
  group: int
  rows: int
  lanes: int
  unrolled: int

  def vmem_bytes(self, width: int, k: int, dtype: jnp.dtype) -> int:
    """VMEM that the kernel needs, with double buffers of what streams."""
    size = jnp.dtype(dtype).itemsize
    block = self.bins * self.depth
    streams = 2 * size * width * (self.tokens + block) + 2 * 32 * block
    results = 2 * 4 * self.tokens * (2 * k + 8)
    steps = sorting_network.scratch_steps(self.kept * self.bins, k)
    scratch = 4 * self.tokens * (2 * 8 * steps + 8)
    # What does not fit registers.
    product = 2 * 4 * self.rows * (self.lanes + LANES)
    return int(1.1 * (streams + results + scratch + product)) + 2**21


def failing_share(k: int, bins: int, kept: int) -> float:
  """Share of tokens of which some bin holds more than `kept` of the top k.

  For winners in random bins; the bound is the sum over bins of the binomial
  tail, close where it is small.
  """
  chance = 1 / bins
  tail = 1 - sum(
    math.comb(k, r) * chance**r * (1 - chance) ** (k - r)
    for r in range(min(k, kept) + 1)
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
  for r in range(kept + 1, min(k, int(size)) + 1):
    if k - r > n_latents - size:
      continue
    chance = math.exp(
      log_choose(k, r)
      + log_choose(n_latents - k, size - r)
      - log_choose(n_latents, size)
    )
    lost += (r - kept) * chance
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
    recall: share of the top k that bins must be expected to keep. At 1 they
      are chosen so that nearly every token passes the test of exactness. Below
      1 they are the fewest that keep this share, or fewer where those do not
      fit VMEM: `expected_recall` of the result says what is kept.

  Raises:
    UserError: if not even the smallest blocks fit.
  """
  factor = jnp.float32 if dtype is None else dtype
  on_tpu = not chip.interpret()
  vmem = chip.vmem_bytes(interpreted_as=_TEST_CHIP)
  unit = LANES if on_tpu else _TEST_UNIT
  kept, bins = _bins(n_latents, k, unit, recall)
  group = _group(n_latents, k) if recall == 1 else 1
  padded = max(LANES, pl.cdiv(batch, LANES) * LANES)
  while bins * kept >= k:
    for tokens, depth in itertools.product(_TOKENS, _DEPTHS):
      rows = _rows(bins, depth, unit, _ROWS if on_tpu else _TEST_ROWS)
      lanes = min(tokens, _MOST_LANES)
      tiles = Tiles(
        tokens=tokens,
        bins=bins,
        depth=depth,
        kept=kept,
        group=min(group, depth),
        rows=rows,
        lanes=lanes,
        # Interpreted, many products in a row would only be slow to compile.
        unrolled=_unrolled(bins * depth // rows, rows * lanes * width)
        if on_tpu
        else 1,
      )
      fits = tiles.vmem_bytes(width, k, factor) <= 0.9 * vmem
      if fits and tokens <= padded:
        return tiles
    # Then more tokens fail, and are computed again.
    bins = bins // 2 // unit * unit
  raise errors.UserError(
    f'k {k} at d_model {width} needs blocks that do not fit the {vmem} bytes '
    "of VMEM: use fewer active latents, or implementation 'gather'"
  )


def _bins(n_latents, k, unit, recall) -> tuple[int, int]:
  """How many values a bin keeps, and the fewest bins that will do."""

  def fewest(kept, enough):
    bins = unit
    while not enough(bins, kept):
      bins += unit
    # Many are whole products several times over, to unroll these by.
    step = 4 * _ROWS if bins >= 16 * _ROWS else unit
    bins = -(-bins // step) * step
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

  # Each value that a bin keeps costs a comparison for every latent, and the
  # values of all bins are sorted in the end.
  for kept in range(1, _KEPT):
    bins = fewest(kept, recalls)
    if kept * bins <= _KEPT * exact:
      return kept, bins
  return _KEPT, min(exact, fewest(_KEPT, recalls))


def grouped_share(n_latents: int, k: int, group: int) -> float:
  """Share of tokens of which two of the top k meet in a group of latents.

  For winners among random latents; the expected number of pairs that meet,
  close where it is small.
  """
  return min(1.0, k * (k - 1) / 2 * (group - 1) / max(1, n_latents - 1))


def _group(n_latents: int, k: int) -> int:
  """The largest group that seldom has two winners."""
  return next(
    group
    for group in _GROUPS
    if group == 1 or grouped_share(n_latents, k, group) <= _MEETING
  )


def _rows(bins: int, depth: int, unit: int, limit: int) -> int:
  """Latents of one product: up to `limit`, or the fewest there can be."""
  fits = [
    own * depth
    for own in range(bins, 0, -SUBLANES)
    if not bins % own and not own * depth % unit
  ]
  return next((rows for rows in fits if rows <= limit), fits[-1])


def _unrolled(products: int, size: int) -> int:
  """Products of a basic block: about as long for any width.

  Narrow products are limited in number too, since each takes as long to trace
  and to compile as a wide one.
  """
  limit = min(_PRODUCTS, max(1, _BODY // size))
  return max(
    i for i in range(1, products + 1) if i <= limit and not products % i
  )
