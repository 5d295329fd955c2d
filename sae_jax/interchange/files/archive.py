"""Zip archives of tensors: what is in them, checked before it is read.

PyTorch's `.pt` and numpy's `.npz` are zip archives (PKWARE's APPNOTE 6.3.10).
A member's name is a key and never a path. A member is stored, or deflated and
then inflated piece by piece; no size that a header gives is believed that the
file has no bytes for.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import io
import struct
from typing import BinaryIO
import zlib

from etils import epath

from sae_jax import errors
from sae_jax.storage import tensors

_LOCAL = struct.Struct('<4s5H3I2H')
_CENTRAL = struct.Struct('<4s6H3I5H2I')
_END = struct.Struct('<4s4H2IH')
_END_64 = struct.Struct('<4sQ2H2I4Q')
_LOCATOR_64 = struct.Struct('<4sIQI')
_UNSET_16, _UNSET_32 = 2**16 - 1, 2**32 - 1
# A comment may follow the end record.
_TAIL = _END.size + 2**16
_MOST_MEMBERS = 2**16
_LONGEST_DIRECTORY = 16 * 2**20
STORED, DEFLATED = 0, 8
# Deflate makes 1,032 bytes of one at the most; weights, of which many are
# zeros, some.
_HIGHEST_RATIO = 1032
_HIGHEST_RATIO_OF_LARGE = 20
_LARGE = 64 * 2**20
# Bytes that are inflated at once.
_PIECE = 2**20


@dataclasses.dataclass(frozen=True)
class Member:
  """An entry of an archive.

  Attributes:
    name: its name.
    header: byte at which its local header begins.
    end: byte before which its data ends: where the next entry begins.
    stored_size: its bytes in the file.
    size: its bytes.
    is_deflated: whether they are deflated.
    crc: their CRC-32.
  """

  name: str
  header: int
  end: int
  stored_size: int
  size: int
  is_deflated: bool
  crc: int


def members(file: BinaryIO, size: int) -> dict[str, Member]:
  """The members of an archive by name.

  Args:
    file: the archive.
    size: its bytes.

  Raises:
    ValueError: if it is not whole, or its members overlap, are encrypted or
      packed in another way, or have a name twice.
  """
  count, start, length = _directory(file, size)
  if count > _MOST_MEMBERS or length > _LONGEST_DIRECTORY:
    raise ValueError(
      f'it has {count:,} members and a directory of {length:,} bytes, of which '
      f'at most {_MOST_MEMBERS:,} and {_LONGEST_DIRECTORY:,} are read'
    )
  if start + length > size:
    raise ValueError(f'its directory would end at byte {start + length:,}')
  directory = read_at(file, start, length)
  entries, at = [], 0
  for _ in range(count):
    entry, at = _entry(directory, at)
    entries.append(entry)
  entries.sort(key=lambda entry: entry.header)
  by_name: dict[str, Member] = {}
  for entry, after in zip(entries, [*entries[1:], None]):
    end = after.header if after else start
    least = entry.header + _LOCAL.size + len(entry.name) + entry.stored_size
    if least > end:
      raise ValueError(f'its member {entry.name} overlaps with the next one')
    if entry.name in by_name:
      raise ValueError(f'it has the member {entry.name} twice')
    by_name[entry.name] = dataclasses.replace(entry, end=end)
  return by_name


def _directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
  """Count of the directory's entries, its first byte, and its length."""
  tail_size = min(size, _TAIL)
  tail = read_at(file, size - tail_size, tail_size)
  at = tail.rfind(b'PK\x05\x06')
  if at < 0 or at + _END.size > len(tail):
    raise ValueError('it has no end record, which is the last of an archive')
  _, disk, first_disk, here, count, length, start, _ = _END.unpack_from(
    tail, at
  )
  at += size - tail_size
  if (
    _UNSET_16 in (here, count)
    or _UNSET_32 in (length, start)
    or (
      at >= _LOCATOR_64.size
      and read_at(file, at - _LOCATOR_64.size, 4) == b'PK\x06\x07'
    )
  ):
    locator = read_at(file, at - _LOCATOR_64.size, _LOCATOR_64.size)
    mark, _, at_64, _ = _LOCATOR_64.unpack(locator)
    if mark != b'PK\x06\x07' or at_64 + _END_64.size > size:
      raise ValueError('it has no 64-bit end record, of which it needs one')
    fields = _END_64.unpack(read_at(file, at_64, _END_64.size))
    if fields[0] != b'PK\x06\x06':
      raise ValueError('it has no 64-bit end record where it should be')
    disk, first_disk, here, count, length, start = fields[4:]
  if disk or first_disk or here != count:
    raise ValueError('it is one part of several')
  return count, start, length


def _entry(directory: bytes, at: int) -> tuple[Member, int]:
  """The member whose entry of the directory begins at a byte, and its end."""
  if at + _CENTRAL.size > len(directory):
    raise ValueError('its directory ends early')
  fields = _CENTRAL.unpack_from(directory, at)
  mark, flags, method = fields[0], fields[3], fields[4]
  crc, stored_size, size = fields[7:10]
  name_size, extra_size, comment_size, disk = fields[10:14]
  header = fields[16]
  at += _CENTRAL.size
  end = at + name_size + extra_size + comment_size
  if mark != b'PK\x01\x02' or end > len(directory):
    raise ValueError('its directory is damaged')
  name = directory[at : at + name_size].decode()
  extra = directory[at + name_size : at + name_size + extra_size]
  size, stored_size, header = _sizes_64(extra, [size, stored_size, header])
  if flags & 1 or disk not in (0, _UNSET_16):
    raise ValueError(f'its member {name} is encrypted, or in another file')
  if method not in (STORED, DEFLATED):
    raise ValueError(f'its member {name} is packed by method {method}')
  ratio = _HIGHEST_RATIO if size <= _LARGE else _HIGHEST_RATIO_OF_LARGE
  if size != stored_size and (method == STORED or size > ratio * stored_size):
    raise ValueError(
      f'its member {name} would have {size:,} bytes, made of {stored_size:,}'
    )
  return Member(
    name, header, 0, stored_size, size, method == DEFLATED, crc
  ), end


def _sizes_64(extra: bytes, sizes: list[int]) -> list[int]:
  """Sizes, those that need 64 bits replaced by those of the extra field."""
  at = 0
  while at + 4 <= len(extra):
    kind, length = struct.unpack_from('<2H', extra, at)
    field = extra[at + 4 : at + 4 + length]
    if kind == 1:
      for index, value in enumerate(sizes):
        if value == _UNSET_32:
          if len(field) < 8:
            raise ValueError('its directory lacks a 64-bit size')
          sizes[index] = struct.unpack_from('<Q', field)[0]
          field = field[8:]
      break
    at += 4 + length
  return sizes


def data_offset(file: BinaryIO, member: Member) -> int:
  """The byte at which a member's data begins.

  Raises:
    ValueError: if its own header does not agree with the directory.
  """
  fields = _LOCAL.unpack(read_at(file, member.header, _LOCAL.size))
  method, name_size, extra_size = fields[3], fields[9], fields[10]
  start = member.header + _LOCAL.size + name_size + extra_size
  name = read_at(file, member.header + _LOCAL.size, name_size)
  if (
    fields[0] != b'PK\x03\x04'
    or name != member.name.encode()
    or (method == DEFLATED) != member.is_deflated
    or start + member.stored_size > member.end
  ):
    raise ValueError(f'its member {member.name} is not where it should be')
  return start


def read_whole(file: BinaryIO, member: Member, longest: int) -> bytes:
  """A member's bytes, whose checksum is compared.

  Args:
    file: the archive.
    member: one of its members.
    longest: bytes that it may have.

  Raises:
    ValueError: if it has more, or they are not what was stored.
  """
  if member.size > longest:
    raise ValueError(
      f'its member {member.name} has {member.size:,} bytes, of which at most '
      f'{longest:,} are read'
    )
  with opened(file, member) as content:
    data = content.read(member.size)
  if len(data) != member.size or zlib.crc32(data) != member.crc:
    raise ValueError(f'its member {member.name} is damaged')
  return data


@contextlib.contextmanager
def opened(file: BinaryIO, member: Member) -> Iterator[BinaryIO]:
  """A member as a file that can be read and seek.

  A deflated one is inflated from its start up to where is read, again for each
  step back.

  Raises:
    ValueError: see `data_offset`.
  """
  start = data_offset(file, member)
  if member.is_deflated:
    yield _Inflated(file, start, member)
  else:
    yield _Stored(file, start, member)


def opener(url: str, member: Member) -> tensors.Opener:
  """A function that opens a member of the archive at a URL."""

  @contextlib.contextmanager
  def open_member() -> Iterator[BinaryIO]:
    with epath.Path(url).open('rb') as file:
      try:
        with opened(file, member) as content:
          yield content
      except errors.UserError:
        raise
      except ValueError as error:
        raise errors.UserError(
          f'{url} cannot be read ({errors.reason(error)}): get it again'
        ) from error

  return open_member


class _Stored(io.RawIOBase):
  """A part of a file, as a file."""

  def __init__(self, file: BinaryIO, start: int, member: Member):
    self._file, self._start, self._size = file, start, member.size
    self._at = 0

  def seek(self, offset: int, whence: int = 0) -> int:
    del whence  # Always from the start.
    self._at = offset
    return offset

  def read(self, size: int = -1) -> bytes:
    size = max(0, min(size, self._size - self._at))
    self._file.seek(self._start + self._at)
    data = self._file.read(size)
    self._at += len(data)
    return data


class _Inflated(io.RawIOBase):
  """A deflated part of a file, as a file; it never has more than its size."""

  def __init__(self, file: BinaryIO, start: int, member: Member):
    self._file, self._start, self._member = file, start, member
    self._rewind()

  def _rewind(self) -> None:
    self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    self._at, self._taken, self._ahead = 0, 0, b''

  def seek(self, offset: int, whence: int = 0) -> int:
    del whence  # Always from the start.
    if offset < self._at:
      self._rewind()
    while self._at < offset and self._piece(offset - self._at):
      pass
    return self._at

  def read(self, size: int = -1) -> bytes:
    size = max(0, min(size, self._member.size - self._at))
    pieces = []
    while size:
      piece = self._piece(size)
      if not piece:
        break
      pieces.append(piece)
      size -= len(piece)
    return b''.join(pieces)

  def _piece(self, most: int) -> bytes:
    """Some of the next bytes, none at the end."""
    while True:
      if not self._ahead and self._taken < self._member.stored_size:
        self._file.seek(self._start + self._taken)
        self._ahead = self._file.read(
          min(_PIECE, self._member.stored_size - self._taken)
        )
        self._taken += len(self._ahead)
      is_end = not self._ahead
      try:
        data = self._inflater.decompress(self._ahead, min(most, _PIECE))
      except zlib.error as error:
        raise ValueError(
          f'its member {self._member.name} is damaged ({error})'
        ) from error
      self._ahead = self._inflater.unconsumed_tail
      self._at += len(data)
      if data or is_end or self._inflater.eof:
        return data


def read_at(file: BinaryIO, at: int, size: int) -> bytes:
  """Bytes of a file; ValueError if it ends before."""
  file.seek(at)
  data = file.read(size)
  if len(data) != size:
    raise ValueError(f'it ends {size - len(data):,} bytes too early')
  return data
