"""The bytes of a text file, unpacked by what they are, not by its name."""

from collections.abc import Iterable, Iterator
import functools
import gzip
import io
import re

import zstandard

from sae_jax import errors

READ_BYTES = 2**16
# Bytes that are decompressed at a time: zstd can make 128 KiB of 4 bytes.
_ZSTD_BYTES = 512
# A window is held in memory. This one is zstd's --long=28.
LONGEST_WINDOW = 2**28

_GZIP = rb'\x1f\x8b'
# A frame, or one that is to be skipped.
_ZSTD = rb'\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18'
_UNPACK = 'unpack it, or compress it with gzip or zstd'
_CONVERT = 'convert it with iconv -f {} -t UTF-8'
# First bytes of files that are no text; the first that fits is taken.
_OTHERS = (
  (rb'\xff\xfe\0\0|\0\0\xfe\xff', 'UTF-32', _CONVERT.format('UTF-32')),
  (rb'\xff\xfe|\xfe\xff', 'UTF-16', _CONVERT.format('UTF-16')),
  (_GZIP, 'compressed with gzip', 'unpack it'),
  (_ZSTD, 'compressed with zstd', 'unpack it'),
  (rb'BZh[1-9]1AY&SY', 'compressed with bzip2', _UNPACK),
  (rb'\xfd7zXZ\0', 'compressed with xz', _UNPACK),
  (rb'\x04"M\x18', 'compressed with lz4', _UNPACK),
  (rb'PK\x03\x04|PK\x05\x06', 'a zip archive', _UNPACK),
  (rb"7z\xbc\xaf'\x1c", 'a 7z archive', _UNPACK),
  (rb'(?s).{257}ustar', 'a tar archive', _UNPACK),
  (rb'PAR1[\x15\x19]', 'parquet', 'end its name in .parquet'),
  (rb'ARROW1\0\0', 'an Arrow file', 'write it as parquet'),
  (rb'%PDF-', 'a PDF', 'extract its text'),
  (
    rb'version https://git-lfs\.',
    'a pointer of Git LFS',
    'fetch what it points to with git lfs pull',
  ),
)


class _Blocks(io.RawIOBase):
  """Blocks of bytes, none of them empty, as a file."""

  def __init__(self, blocks: Iterable[bytes]):
    self._blocks, self._rest = iter(blocks), memoryview(b'')

  def readable(self):
    return True

  def readinto(self, buffer):
    filled = 0
    while filled < len(buffer):
      self._rest = self._rest or memoryview(next(self._blocks, b''))
      if not self._rest:
        break
      count = min(len(buffer) - filled, len(self._rest))
      buffer[filled : filled + count] = self._rest[:count]
      self._rest = self._rest[count:]
      filled += count
    return filled


def _buffered(blocks: Iterable[bytes]) -> io.BufferedReader:
  return io.BufferedReader(_Blocks(blocks), READ_BYTES)


def of(file, shown: str) -> io.BufferedReader:
  """The content of an opened file, unpacked if it is gzip or zstd.

  Args:
    file: the file, opened for bytes; it need not be seekable.
    shown: its name in messages.

  Raises:
    UserError: if it is packed twice or otherwise, or no UTF-8; as it is read,
      if it needs a window above LONGEST_WINDOW bytes. Damage raises what the
      unpacking library does.
  """
  data = _buffered(iter(functools.partial(file.read, READ_BYTES), b''))
  head = data.peek()
  packed = True
  if re.match(_GZIP, head):
    data = io.BufferedReader(gzip.GzipFile(fileobj=data), READ_BYTES)
  elif re.match(_ZSTD, head):
    data = _buffered(_zstd_blocks(data, shown))
  else:
    packed = False
  head = data.peek()
  if packed and re.match(rb'%b|%b' % (_GZIP, _ZSTD), head):
    raise errors.UserError(f'{shown} is compressed twice: unpack it once')
  check_text(head, shown)
  return data


def check_text(head: bytes, shown: str) -> None:
  """Raises UserError if a file that begins with these bytes is no text."""
  kind = name_of(head)
  if kind is not None:
    raise errors.UserError(f'{shown} is {kind[0]}: {kind[1]}')


def name_of(head: bytes) -> tuple[str, str] | None:
  """What a file that is no UTF-8 is, and a remedy; None if it may be UTF-8."""
  for pattern, name, remedy in _OTHERS:
    if re.match(pattern, head):
      return name, remedy
  encoding = _wide(head)
  return encoding and (f'{encoding} without a mark', _CONVERT.format(encoding))


def _wide(head: bytes) -> str | None:
  """UTF-16 that does not say so: every other byte of most texts is 0."""
  pairs = len(head) // 2
  if pairs < 2:
    return None
  first, second = (head[i : 2 * pairs : 2].count(0) / pairs for i in (0, 1))
  if second > 0.4 and first < 0.1:
    return 'UTF-16LE'
  return 'UTF-16BE' if first > 0.4 and second < 0.1 else None


def _zstd_blocks(file, shown: str) -> Iterator[bytes]:
  """What zstd unpacks; its own reader accepts files that are cut short."""
  unpacker = zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW)
  frame = None
  while raw := file.read(READ_BYTES):
    place = 0
    while place < len(raw):
      frame = frame or unpacker.decompressobj()
      piece = raw[place : place + _ZSTD_BYTES]
      place += len(piece)
      try:
        content = frame.decompress(piece)
      except zstandard.ZstdError as error:
        if 'memory' not in str(error):
          raise
        raise errors.UserError(
          f'{shown} needs a zstd window of more than {LONGEST_WINDOW >> 20} '
          'MiB: compress it again with zstd --long=28, or less'
        ) from None
      if frame.eof:
        # What follows is the next frame.
        place -= len(frame.unused_data)
        frame = None
      if content:
        yield content
  if frame is not None:
    raise EOFError('it ends within a frame')
