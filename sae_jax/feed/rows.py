"""Consecutive rows on a mesh, of a store or computed from text."""

from collections.abc import Callable
import functools

import jax
from jax.sharding import Mesh
import numpy as np

from sae_jax import mesh as mesh_lib
from sae_jax import store
from sae_jax.feed.text_rows import TextRows

Rows = store.Store | TextRows


def read_rows(
  data: Rows,
  start: int,
  size: int,
  mesh: Mesh,
  stop: int | None = None,
  finite: bool = False,
) -> jax.Array:
  """Rows start to start + size on the devices, [size, D] float32.

  Each process reads the rows of a store that its own devices hold.

  Args:
    data: the rows.
    start: first row.
    size: number of rows.
    mesh: its data axis splits the rows; that of rows that are computed.
    stop: past the last row that is read, the others are copies of that; None
      for `start + size`.
    finite: whether rows must be finite.

  Raises:
    UserError: see `Store.read_rows` and `Store.finite_rows`, or
      `TextRows.on_devices`.
  """
  stop = start + size if stop is None else stop
  if isinstance(data, TextRows):
    return data.on_devices(start, stop, size, finite)
  read = data.finite_rows if finite else data.read_rows
  shape = (size, data.width)
  return place(read, start, stop, shape, mesh, 'BD')


def place(
  read: Callable[[int, int], np.ndarray],
  start: int,
  stop: int,
  shape: tuple[int, ...],
  mesh: Mesh,
  letters: str,
) -> jax.Array:
  """Rows start to stop of an array on the devices, then copies of the last.

  Args:
    read: gives rows from one to before another.
    start: first row.
    stop: one past the last.
    shape: of the result; it has as many rows, or more.
    mesh: its data axis splits the rows.
    letters: axes of the result, B first.
  """

  # Devices along the latent axis hold the same rows: they are read once.
  @functools.cache
  def part(first, last):
    size = last - first
    first = min(start + first, stop - 1)
    rows = read(first, min(first + size, stop))
    more = [(0, size - len(rows)), *[(0, 0)] * (rows.ndim - 1)]
    return np.pad(rows, more, mode='edge') if len(rows) < size else rows

  return jax.make_array_from_callback(
    shape,
    mesh_lib.sharding(mesh, letters),
    lambda index: part(*index[0].indices(shape[0])[:2]),
  )
