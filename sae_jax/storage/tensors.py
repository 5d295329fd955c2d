"""Tensors in files: shape and type are known first, values are read by parts.

No more than a part and `_PIECE` bytes are in memory, however large a tensor is.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import math
import tempfile
from typing import BinaryIO

import ml_dtypes
import numpy as np

from sae_jax import errors

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# Bytes that are read at once, and that a block of `Tensor.blocks` has.
_PIECE = 16 * 2**20
_BLOCK = 64 * 2**20
# A run of so many bytes is worth a read of its own where little else is used.
_RUN = 4096
# A file of no more bytes may well be read once for each of its blocks.
_LITTLE = 16 * _BLOCK
# More axes than any weights have, fewer than numpy can bear.
MOST_AXES = 16
# Sizes that PyTorch and safetensors store are 64 bits.
LARGEST = 2**63

Ranges = tuple[tuple[int, int], ...]
Opener = Callable[[], contextlib.AbstractContextManager[BinaryIO]]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor whose values may lie in a file.

  Attributes:
    shape: its sizes.
    dtype: numpy's type of its values, bfloat16 as `BFLOAT16`.
    part: function from the (start, stop) of each axis to the values there.
    chunk: sizes of the chunks in which it lies, of which each is read as a
      whole; None if any values are read alone.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  part: Callable[[Ranges], np.ndarray]
  chunk: tuple[int, ...] | None = None

  def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows `start` to `stop` of the first axis, by default all values.

    Raises:
      UserError: if the file is not there any more, or ends too early.
    """
    whole = tuple((0, size) for size in self.shape)
    if not whole:
      return self.part(())
    stop = self.shape[0] if stop is None else min(stop, self.shape[0])
    return self.part(((min(start, stop), stop), *whole[1:]))

  def blocks(self, n_bytes: int = _BLOCK) -> Iterator[np.ndarray]:
    """All rows in order, blocks of at most `n_bytes` or a row at a time."""
    if not self.shape:
      yield self.read()
      return
    row = math.prod(self.shape[1:]) * self.dtype.itemsize
    step = max(1, n_bytes // max(row, 1))
    if self.chunk and step > self.chunk[0]:
      step -= step % self.chunk[0]
    for start in range(0, self.shape[0], step):
      yield self.read(start, start + step)

  @property
  def T(self) -> 'Tensor':
    """It with the order of its axes reversed; nothing is read."""
    return Tensor(
      self.shape[::-1],
      self.dtype,
      lambda ranges: self.part(ranges[::-1]).T,
      self.chunk and self.chunk[::-1],
    )


def from_array(array: np.ndarray) -> Tensor:
  """An array in memory as a tensor."""
  array = np.asarray(array)
  return Tensor(
    array.shape,
    array.dtype,
    lambda ranges: array[tuple(slice(*one) for one in ranges)],
  )


def stored(
  opener: Opener,
  offset: int,
  shape: Sequence[int],
  dtype: np.dtype,
  where: str,
  strides: Sequence[int] | None = None,
) -> Tensor:
  """A tensor in a file, little-endian.

  Args:
    opener: opens the file, which can seek.
    offset: byte of its first value.
    shape: its sizes.
    dtype: type of the values.
    where: tensor and file, for the error.
    strides: values from one index of each axis to the next; None if the last
      axis is the fastest and none is skipped. They must not overlap.
  """
  shape = tuple(shape)
  strides = contiguous(shape) if strides is None else tuple(strides)

  def part(ranges: Ranges) -> np.ndarray:
    sizes = tuple(stop - start for start, stop in ranges)
    is_bool = dtype.kind == 'b'
    raw = np.dtype(np.uint8) if is_bool else dtype
    out = np.empty(sizes, raw)
    if out.size:
      first = sum(start * step for (start, _), step in zip(ranges, strides))
      try:
        with opener() as file:
          _fill(file, offset, first, strides, out, where)
      except OSError as error:
        raise errors.UserError(
          f'{where} cannot be read ({errors.reason(error)}): get it again'
        ) from error
    # A byte of a damaged file may be neither 0 nor 1.
    return out != 0 if is_bool else out

  return Tensor(shape, dtype, part)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
  """Strides, in values, of an array whose last axis is the fastest."""
  return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _fill(file, offset, first, strides, out, where) -> None:
  """Reads the values of a strided array, `_PIECE` bytes at most at a time."""
  item = out.itemsize
  reach = [(n - 1) * step for n, step in zip(out.shape, strides)]
  span = (1 + sum(reach)) * item
  axis = max(range(out.ndim), key=reach.__getitem__, default=None)
  # Values that are far apart are not worth what lies between them.
  run = out.nbytes // out.shape[axis] if out.ndim else 0
  is_sparse = out.ndim and reach[axis] and run >= _RUN and span > 2 * out.nbytes
  if span <= _PIECE and not is_sparse:
    data = exactly(file, offset + first * item, span, where)
    out[...] = np.lib.stride_tricks.as_strided(
      np.frombuffer(data, out.dtype),
      out.shape,
      [step * item for step in strides],
      writeable=False,
    )
    return
  rest = span - reach[axis] * item
  step = 1
  if not is_sparse:
    step = max(1, (_PIECE - rest) // (strides[axis] * item) + 1)
  for start in range(0, out.shape[axis], step):
    places = (slice(None),) * axis + (slice(start, start + step),)
    _fill(
      file,
      offset,
      first + start * strides[axis],
      strides,
      out[places],
      where,
    )


def exactly(file: BinaryIO, offset: int, size: int, where: str) -> bytes:
  """Bytes of a file.

  Raises:
    UserError: if it ends before, or cannot be read.
  """
  try:
    file.seek(offset)
    data = file.read(size)
  except (OSError, ValueError, OverflowError) as error:
    raise errors.UserError(
      f'{where} cannot be read ({errors.reason(error)}): get it again'
    ) from error
  if len(data) != size:
    raise errors.UserError(
      f'{where} ends {size - len(data):,} bytes too early: get it again'
    )
  return data


def by_rows(tensor: Tensor) -> Tensor:
  """A matrix, to be read by `blocks`, that may lie in the other order of axes.

  Where a block's columns would be so short in the file that each block takes
  reading all of it, many times its size, or where each block has a part of the
  same chunks, the first block makes a temporary copy in this order, by one
  reading.

  Raises:
    OSError: by `part`, if there is no room for the copy.
  """
  rows, columns = tensor.shape
  row = columns * tensor.dtype.itemsize
  step = max(1, _BLOCK // row)
  if tensor.chunk is None:
    is_fast = step * tensor.dtype.itemsize >= _RUN or rows * row <= _LITTLE
  else:
    is_fast = min(tensor.chunk[0], rows) <= step
  if is_fast:
    return tensor

  @functools.cache
  def copy() -> BinaryIO:
    # Closed, and with that deleted, when the tensor is forgotten.
    file = tempfile.TemporaryFile()  # noqa: SIM115
    start = 0
    for block in tensor.T.blocks(_BLOCK):
      for number, values in enumerate(np.ascontiguousarray(block.T)):
        file.seek(number * row + start * tensor.dtype.itemsize)
        file.write(as_bytes(values))
      start += len(block)
    file.flush()
    return file

  def part(ranges: Ranges) -> np.ndarray:
    file = copy()
    opener = functools.partial(contextlib.nullcontext, file)
    where = 'a temporary copy'
    return stored(opener, 0, tensor.shape, tensor.dtype, where).part(ranges)

  return Tensor(tensor.shape, tensor.dtype, part)


def as_bytes(block: np.ndarray) -> memoryview:
  """The bytes of a block of values, in the order of its axes."""
  block = np.ascontiguousarray(block).reshape(-1)
  if block.dtype.byteorder == '>':
    block = block.astype(block.dtype.newbyteorder('<'))
  return memoryview(block.view(np.uint8))
