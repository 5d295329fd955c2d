"""numpy's `.npz` files, read by rows and without pickles.

An archive of `.npy` files, whose header is a Python dict in text (numpy's
NEP 1). It is matched and not evaluated: numpy writes one form of it.
"""

import math
import re
import struct
from typing import BinaryIO

import numpy as np

from sae_jax import errors
from sae_jax.interchange.files import archive
from sae_jax.storage import safetensors, tensors

_SUFFIX = '.npy'
_MAGIC = b'\x93NUMPY'
# numpy, too, reads no longer header.
_LONGEST_HEADER = 10_000
_HEADER = re.compile(
  r"\{'descr': '([^']{1,20})', 'fortran_order': (True|False), "
  r"'shape': \(((?:\d{1,19}, ?)*(?:\d{1,19})?)\), \} *\n?"
)
_DTYPES = {
  np.lib.format.dtype_to_descr(dtype): dtype
  for dtype in safetensors.DTYPES.values()
  if dtype.isbuiltin == 1
}


def is_archive(names: dict[str, archive.Member]) -> bool:
  """Whether the members of a zip archive are those of a `.npz` file."""
  return bool(names) and all(name.endswith(_SUFFIX) for name in names)


def read_archive(
  url: str, file: BinaryIO, members: dict[str, archive.Member]
) -> dict[str, tensors.Tensor]:
  """The arrays of a file.

  Args:
    url: local path or URL.
    file: the opened file.
    members: of the archive.

  Raises:
    ValueError: if it is not whole, or an array is of objects or of a type that
      no weights have.
  """
  content = {}
  for name, member in members.items():
    with archive.opened(file, member) as stream:
      shape, dtype, is_fortran, offset = _header(stream)
    n_bytes = math.prod(shape) * dtype.itemsize
    if offset + n_bytes != member.size:
      raise ValueError(
        f'array {name} of {shape} {dtype} has {member.size - offset:,} bytes'
      )
    strides = tensors.contiguous(shape)
    if is_fortran:
      strides = tensors.contiguous(shape[::-1])[::-1]
    plain = name.removesuffix(_SUFFIX)
    content[plain] = tensors.stored(
      archive.opener(url, member),
      offset,
      shape,
      dtype,
      f'{plain} of {url}',
      strides,
    )
  return content


def _header(
  stream: BinaryIO,
) -> tuple[tuple[int, ...], np.dtype, bool, int]:
  """Shape, type, whether the first axis is fastest, and where values begin."""
  head = stream.read(12)
  if len(head) < 12 or not head.startswith(_MAGIC):
    raise ValueError('it has a member that is no array')
  version = head[6]
  if version == 1:
    length, start = struct.unpack('<H', head[8:10])[0], 10
  elif version == 2:
    length, start = struct.unpack('<I', head[8:12])[0], 12
  else:
    raise ValueError(f'it has an array of version {version}')
  if length > _LONGEST_HEADER:
    raise ValueError(f'it has an array with a header of {length:,} bytes')
  text = (head[start:] + stream.read(max(0, start + length - 12)))[:length]
  match = _HEADER.fullmatch(text.decode('latin1'))
  if match is None:
    raise ValueError(
      'it has an array whose header is not as numpy writes one of numbers: '
      f'{errors.printable(text.decode("latin1"), 100)!r}'
    )
  descr, order, sizes = match.groups()
  if descr not in _DTYPES:
    raise ValueError(
      f'it has an array of the type {descr!r}, none of {", ".join(_DTYPES)}'
    )
  shape = tuple(int(size) for size in re.findall(r'\d+', sizes))
  if len(shape) > tensors.MOST_AXES:
    raise ValueError(f'it has an array of {len(shape)} axes')
  return shape, _DTYPES[descr], order == 'True', start + length
