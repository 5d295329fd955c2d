"""Rows of tables in HBM, copied to VMEM by index while others are reduced.

A row takes its own copy, and what limits a TensorCore with narrow rows is how
fast its scalar unit can issue them: 7 cycles each by the compiler's estimate,
against 3 that HBM needs for 768 float32 on v6e. So copies are issued in long
straight runs, in the same basic block as the reduction of rows that came
before: there the scalar and the vector slots of an instruction fill together.
The compiler mixes the two only where it can see that they touch different
memory, hence two buffers and code for either turn, not one with an index.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from sae_jax.ops.chip import SUBLANES

# Rows of a part: issued in one run, waited for with one semaphore and reduced
# by one product. 128 fill the MXU's contracting side (half of v6e's); 256
# gained nothing in the compiler's estimate.
PART = 128
# Rows of a run where a part is not full; in place of rows beyond the last real
# one it copies row 0.
_GROUP = 16


class Buffer(NamedTuple):
  """A chunk of rows of every table in VMEM.

  Attributes:
    rows: [parts, PART / 8, 8, W] for each table: a row is one sublane.
    arrived: a DMA semaphore per part.
  """

  rows: Sequence[Any]
  arrived: Any


def in_hbm(table: jax.Array, interpret: Any) -> jax.Array:
  """The table, kept in HBM: XLA would move one that fits to VMEM, whole."""
  if interpret:
    return table
  return pltpu.with_memory_space_constraint(table, pltpu.HBM)


def lanes(part: jax.Array) -> Any:
  """Where a part is in a row of a chunk's values."""
  return pl.ds(part * PART, PART)


def whole_parts(n_rows: int) -> int:
  """The rows of as many parts as `n_rows` need."""
  return pl.cdiv(n_rows, PART) * PART


def scratch(n_rows: int, tables: Sequence[jax.Array]) -> list:
  """Shapes of the scratch memory for two buffers of `n_rows`, for `pair`."""
  parts = n_rows // PART
  rows = [
    pltpu.VMEM((parts, PART // SUBLANES, SUBLANES, t.shape[1]), t.dtype)
    for t in tables
  ]
  return [*rows, *rows, pltpu.SemaphoreType.DMA((2, parts))]


def pair(refs: Sequence[Any]) -> tuple[Buffer, Buffer]:
  """The two buffers in the memory of `scratch`."""
  *rows, arrived = refs
  half = len(rows) // 2
  return Buffer(rows[:half], arrived.at[0]), Buffer(rows[half:], arrived.at[1])


def overlap(
  buffers: tuple[Buffer, Buffer],
  turn: jax.Array,
  tables: Sequence[Any],
  rows_11R: Any,
  n_new: jax.Array,
  n_old: jax.Array,
  reduce: Callable[[jax.Array, list[jax.Array], jax.Array | None], None],
  *,
  waits: jax.Array | bool = True,
  span: tuple[jax.Array, jax.Array] | None = None,
  unroll: bool = True,
) -> None:
  """Copies a chunk of rows into one buffer and reduces the other's.

  Args:
    buffers: of `pair`.
    turn: its parity is the buffer that is filled.
    tables: [N, W] in HBM, of 32 bits; a row is copied from each.
    rows_11R: in SMEM, the rows of the new chunk; those from `n_new` on may be
      anything.
    n_new: how many of them to copy.
    n_old: how many rows of the other buffer are real, the `n_new` of an
      earlier call.
    reduce: called with a part's number, its rows [PART, W] of each table, and
      how many of them are real, None for all; the others are zero.
    waits: whether this is the first call that reduces the old rows, which
      waits for them. The other calls may copy nothing.
    span: the parts to reduce, from the first to before the second; all if
      None.
    unroll: False to loop over the copies, for an interpreter, which is slow
      to compile long code.
  """
  full = n_old // PART
  first, stop = (0, full + 1) if span is None else span
  stop_full = jnp.minimum(stop, full)
  both = jnp.where(first == 0, jnp.minimum(n_new // PART, stop_full), 0)
  ragged = (n_old % PART > 0) & (first <= full) & (full < stop)
  whole = jnp.maximum(first, both), stop_full
  for parity in range(2):
    new, old = buffers[parity], buffers[1 - parity]
    start = functools.partial(_start, tables, rows_11R, new, unroll)
    pl.when(turn % 2 == parity)(
      functools.partial(
        _overlap, start, old, n_new, n_old, reduce, waits, both, whole, ragged
      )
    )


def _overlap(start, old, n_new, n_old, reduce, waits, both, whole, ragged):
  groups = PART // _GROUP
  full = n_old // PART

  def copy_and_reduce(part):
    _wait(old, part)
    start(part)
    reduce(part, _rows(old, part), None)

  def copy(group):
    start(group // groups, group % groups)

  def copy_last(group):
    start(group // groups, group % groups, n_new)

  def wait_part(part):
    _wait(old, part)

  def wait_group(group):
    _wait(old, full, group)

  def reduce_part(part):
    reduce(part, _rows(old, part), None)

  _loop(0, both, copy_and_reduce)
  _loop(both * groups, n_new // _GROUP, copy)
  _loop(n_new // _GROUP, pl.cdiv(n_new, _GROUP), copy_last)

  @pl.when(waits)
  def _():
    _loop(both, full, wait_part)
    _loop(0, pl.cdiv(n_old % PART, _GROUP), wait_group)

  _loop(*whole, reduce_part)

  @pl.when(ragged)
  def _():
    n_real = n_old % PART
    # Rows that were not copied are stale, and may be NaN, which times 0 is NaN.
    reduce(full, [_masked(rows, n_real) for rows in _rows(old, full)], n_real)


def _loop(start, stop, body):
  jax.lax.fori_loop(start, stop, lambda i, _: body(i), None)


def _rows(buffer, part):
  return [rows[part].reshape(PART, -1) for rows in buffer.rows]


def _masked(rows_RW, n_real):
  place_RW = jax.lax.broadcasted_iota(jnp.int32, rows_RW.shape, 0)
  return jnp.where(place_RW < n_real, rows_RW, 0)


def _slice(rows, part, group):
  if group is None:
    return rows.at[part]
  tiles = _GROUP // SUBLANES
  return rows.at[part, pl.ds(group * tiles, tiles)]


def _start(tables, rows_11R, buffer, unroll, part, group=None, n_real=None):
  # A reference to the run's rows: offsets within it are constants, which saves
  # a tenth of the scalar instructions.
  into = [_slice(rows, part, group) for rows in buffer.rows]
  first = part * PART + (0 if group is None else group * _GROUP)

  def copy(r):
    row = rows_11R[0, 0, first + r]
    if n_real is not None:
      row = jnp.where(first + r < n_real, row, 0)
    for table, place in zip(tables, into):
      pltpu.make_async_copy(
        table.at[pl.ds(row, 1)],
        place.at[r // SUBLANES, pl.ds(r % SUBLANES, 1)],
        buffer.arrived.at[part],
      ).start()

  n_rows = PART if group is None else _GROUP
  if unroll:
    for r in range(n_rows):
      copy(r)
  else:
    _loop(0, n_rows, copy)


def _wait(buffer, part, group=None):
  for rows in buffer.rows:
    place = _slice(rows, part, group)
    pltpu.make_async_copy(place, place, buffer.arrived.at[part]).wait()


def multiply(
  a: jax.Array,
  b: jax.Array,
  contracted: tuple[tuple[int], tuple[int]],
  dtype: jnp.dtype | None,
) -> jax.Array:
  """A product in a kernel: factors rounded to `dtype`, sums in float32."""
  full = dtype is None or dtype == jnp.float32
  if not full:
    a, b = a.astype(dtype), b.astype(dtype)
  return jax.lax.dot_general(
    a,
    b,
    (contracted, ((), ())),
    precision=jax.lax.Precision.HIGHEST if full else None,
    preferred_element_type=jnp.float32,
  )
