"""Exact top-k of candidates inside a kernel, by a sorting network.

Tokens lie on lanes and candidates on sublanes, so that a comparison of two
candidates of all tokens is elementwise. A network runs along the rows of
eight candidates ("steps" below), each sublane apart; three merges with rolled
copies then join the eight sublanes. Every comparison is of (value descending,
index ascending), a total order, so equal values come out as a stable sort
leaves them.
"""

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from sae_jax.ops.chip import LANES, SUBLANES
from sae_jax.tpu import target

# Steps that are sorted without leaving registers: 16 values and 16 indices
# are half of the register file. Interpreted, long runs are slow to compile.
_RUN = {'tpu': 16}
_TEST_RUN = 4

_Pair = tuple[jax.Array, jax.Array]


def _run() -> int:
  return _RUN.get(target.platform(), _TEST_RUN)


def _batcher(n: int) -> list[tuple[int, int]]:
  """Comparisons of Batcher's odd-even merge sort, n a power of two."""
  out = []
  p = 1
  while p < n:
    k = p
    while k:
      for j in range(k % p, n - k, 2 * k):
        for i in range(min(k, n - j - k)):
          if (i + j) // (2 * p) == (i + j + k) // (2 * p):
            out.append((i + j, i + j + k))
      k //= 2
    p *= 2
  return out


def _before(a: _Pair, b: _Pair) -> jax.Array:
  """Where a comes before b: a greater value, or the same and a lower index."""
  # `lax` is traced several times faster than `jax.numpy`, and this is unrolled.
  lower = lax.bitwise_and(lax.eq(a[0], b[0]), lax.lt(a[1], b[1]))
  return lax.bitwise_or(lax.gt(a[0], b[0]), lower)


def _ordered(a: _Pair, b: _Pair) -> tuple[_Pair, _Pair]:
  """The two, the earlier first."""
  keep = _before(a, b)
  first = tuple(lax.select(keep, x, y) for x, y in zip(a, b))
  second = tuple(lax.select(keep, y, x) for x, y in zip(a, b))
  return first, second


def _first(a: _Pair, b: _Pair) -> _Pair:
  """The earlier of the two."""
  keep = _before(a, b)
  return tuple(lax.select(keep, x, y) for x, y in zip(a, b))


def _clean(pairs: list[_Pair]) -> list[_Pair]:
  """Sorts a bitonic sequence."""
  pairs = list(pairs)
  stride = len(pairs) // 2
  while stride:
    for i in range(len(pairs)):
      if not i & stride:
        pairs[i], pairs[i + stride] = _ordered(pairs[i], pairs[i + stride])
    stride //= 2
  return pairs


class _Steps:
  """Rows of eight candidates of 128 tokens, in two references."""

  def __init__(self, vals_ref, idx_ref, lane):
    self._refs = vals_ref, idx_ref
    self.lanes = pl.ds(pl.multiple_of(lane * LANES, LANES), LANES)

  def _at(self, step):
    start = step * SUBLANES
    if not isinstance(step, int):
      start = pl.multiple_of(start, SUBLANES)
    return pl.ds(start, SUBLANES), self.lanes

  def get(self, step) -> _Pair:
    return tuple(ref[self._at(step)] for ref in self._refs)

  def set(self, step, pair: _Pair) -> None:
    for ref, value in zip(self._refs, pair):
      ref[self._at(step)] = value


def _sort_runs(steps: _Steps, count: int, run: int) -> None:
  """Sorts runs of `run` steps, which fit registers."""
  network = _batcher(run)

  def body(r, carry):
    pairs = [steps.get(r * run + i) for i in range(run)]
    for i, j in network:
      pairs[i], pairs[j] = _ordered(pairs[i], pairs[j])
    for i, pair in enumerate(pairs):
      steps.set(r * run + i, pair)
    return carry

  lax.fori_loop(0, count // run, body, 0)


def _clean_blocks(steps: _Steps, start, length: int, count: int) -> None:
  """Sorts `count` bitonic sequences that follow each other from `start`."""
  stride, whole = length // 2, _run()
  while stride >= whole:

    def exchange(i, carry, stride=stride):
      low = start + i // stride * (2 * stride) + i % stride
      a, b = _ordered(steps.get(low), steps.get(low + stride))
      steps.set(low, a)
      steps.set(low + stride, b)
      return carry

    lax.fori_loop(0, count * length // 2, exchange, 0, unroll=2)
    stride //= 2
  run = min(length, whole)

  def block(i, carry):
    first = start + i * run
    pairs = _clean([steps.get(first + j) for j in range(run)])
    for j, pair in enumerate(pairs):
      steps.set(first + j, pair)
    return carry

  lax.fori_loop(0, count * length // run, block, 0)


def _merge(steps: _Steps, length: int, count: int) -> None:
  """Merges neighbouring sorted runs of `length`, keeping all."""

  def exchange(i, carry):
    low = i // length * (2 * length)
    a, b = low + i % length, low + 2 * length - 1 - i % length
    first, second = _ordered(steps.get(a), steps.get(b))
    steps.set(a, first)
    steps.set(b, second)
    return carry

  lax.fori_loop(0, count // 2 * length, exchange, 0, unroll=2)
  _clean_blocks(steps, 0, length, count)


def _merge_first(steps: _Steps, length: int, low: int, high: int) -> None:
  """Merges the runs at two places into the first `length`, at the lower."""

  def keep(i, carry):
    other = steps.get(high + length - 1 - i)
    steps.set(low + i, _first(steps.get(low + i), other))
    return carry

  lax.fori_loop(0, length, keep, 0, unroll=2)
  _clean_blocks(steps, low, length, 1)


def _join_sublanes(steps: _Steps, length: int, limit: int) -> None:
  """Merges the eight sublanes' lists, up to `limit` entries of them."""
  for shift in (4, 2, 1):
    grow = 2 * length <= limit
    _join(steps, length, shift, grow)
    _clean_blocks(steps, 0, length, 2 if grow else 1)
    length = 2 * length if grow else length


def _join(steps: _Steps, length: int, shift: int, grow: bool) -> None:
  """First exchange of a merge of each list with that `shift` sublanes off.

  A list and its partner hold each other's entries, so both ends of an
  exchange are read before either is written.
  """

  def rolled(pair):
    return tuple(pltpu.roll(x, shift, 0) for x in pair)

  def exchange(i, carry):
    other = length - 1 - i
    a, b = steps.get(i), steps.get(other)
    first, second = _ordered(a, rolled(b))
    other_first, other_second = _ordered(b, rolled(a))
    steps.set(i, first)
    steps.set(other, other_first)
    if grow:
      steps.set(length + other, second)
      steps.set(length + i, other_second)
    return carry

  # A list of one is its own other end.
  lax.fori_loop(0, -(-length // 2), exchange, 0)


def scratch_steps(candidates: int, k: int) -> int:
  """How many rows of eight `top_k` works in.

  Args:
    candidates: a multiple of 8.
    k: how many are taken.
  """
  limit = pl.next_power_of_2(k)
  steps = candidates // SUBLANES
  # Whole sorted lists: of the final length, or one that holds them all.
  unit = min(limit, pl.next_power_of_2(steps))
  return max(-(-steps // unit) * unit, limit)


def top_k(vals_ref, idx_ref, candidates: int, k: int, out_vals, out_idx):
  """Writes the first k candidates of each token, in order.

  Args:
    vals_ref: [8 * scratch_steps, T] candidates, floats or integers; they are
      overwritten, and rows past `candidates` are filled here.
    idx_ref: their indices, all different where values are finite.
    candidates: how many there are, a multiple of 8.
    k: how many to take.
    out_vals: [k, T] or more rows, descending, equal values by ascending index.
    out_idx: of the same shape.
  """
  limit = pl.next_power_of_2(k)
  steps_count = candidates // SUBLANES
  unit = min(limit, pl.next_power_of_2(steps_count))
  count = -(-steps_count // unit) * unit

  def lane(i, carry):
    steps = _Steps(vals_ref, idx_ref, i)
    shape = (SUBLANES, LANES)
    whole = jnp.issubdtype(vals_ref.dtype, jnp.integer)
    lowest = jnp.iinfo(vals_ref.dtype).min if whole else -jnp.inf
    nothing = (
      jnp.full(shape, lowest, vals_ref.dtype),
      jnp.full(shape, jnp.iinfo(jnp.int32).max, jnp.int32),
    )
    for step in range(steps_count, count):
      steps.set(step, nothing)
    run = min(unit, _run())
    _sort_runs(steps, count, run)
    while run < unit:
      _merge(steps, run, count // run)
      run *= 2
    if count > unit:

      def fold(r, carry):
        _merge_first(steps, unit, 0, r * unit)
        return carry

      lax.fori_loop(1, count // unit, fold, 0)
    _join_sublanes(steps, unit, limit)

    def write(row, count):
      pairs = [steps.get(row + i) for i in range(count)]
      for out, tiles in zip((out_vals, out_idx), zip(*pairs)):
        first = jnp.concatenate([tile[:1] for tile in tiles])
        out[pl.ds(row, count), steps.lanes] = first

    def eight(i, carry):
      write(pl.multiple_of(i * SUBLANES, SUBLANES), SUBLANES)
      return carry

    if k >= SUBLANES:
      lax.fori_loop(0, k // SUBLANES, eight, 0)
    if k % SUBLANES:
      write(k // SUBLANES * SUBLANES, k % SUBLANES)
    return carry

  lax.fori_loop(0, out_vals.shape[1] // LANES, lane, 0)
