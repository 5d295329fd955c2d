"""Damages of files: bytes that flip, sizes that lie, JSON with odd values.

Each is a function of a file's bytes and a generator of random numbers, and
those of bytes alone also of how many from the start may be damaged.
"""

import json
import struct

SIZES = (0, 1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**64 - 1)
ODD = (
  None, -1, 0, 1, 3, 0.5, 1e308, float('nan'), float('inf'), 2**31, 2**40,
  10**30, '', 'x', '../../x', '/etc/passwd', 'a\x00b', '\x1b[31m', [], {}, [[]],
  [None], {'a': 1}, True, False, '1' * 10_000, [1] * 1000, '\ud800',
)  # fmt: skip


def flipped(data, rng, upto):
  data = bytearray(data)
  for _ in range(rng.choice((1, 2, 16))):
    data[rng.randrange(min(upto, len(data)))] = rng.randrange(256)
  return bytes(data)


def resized(data, rng, upto):
  """A number of the head, as many as sizes are, becomes an extreme one."""
  data = bytearray(data)
  struct.pack_into('<Q', data, rng.randrange(upto - 8), rng.choice(SIZES))
  return bytes(data)


def cut(data, rng, upto):
  del upto
  return data[: rng.randrange(len(data))]


def odd_json(data, rng):
  """A JSON text with one value that is odd, gone or broken."""
  value = json.loads(data)
  inner, key = value, rng.choice(sorted(value))
  while isinstance(inner[key], dict) and inner[key] and rng.random() < 0.8:
    inner, key = inner[key], rng.choice(sorted(inner[key]))
  way = rng.choice(('value',) * 6 + ('gone', 'flip', 'cut', 'root', 'deep'))
  if way == 'value':
    inner[key] = rng.choice(ODD)
  elif way == 'gone':
    del inner[key]
  elif way == 'root':
    value = rng.choice(ODD)
  elif way == 'deep':
    return b'[' * 10_000
  data = json.dumps(value).encode()
  if way in ('flip', 'cut'):
    return {'flip': flipped, 'cut': cut}[way](data, rng, len(data))
  return data


def odd_tensors(data, rng):
  """A safetensors file whose header is damaged."""
  size = struct.unpack_from('<Q', data)[0]
  if rng.random() < 0.5:
    way = rng.choice((flipped, resized, cut))
    return way(data, rng, 8 + size)
  header = odd_json(data[8 : 8 + size], rng)
  return struct.pack('<Q', len(header)) + header + data[8 + size :]


OF_BYTES = (flipped, resized, resized, cut)
