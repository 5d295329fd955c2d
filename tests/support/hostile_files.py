"""Files of tensors that lie, or that would run code if they were believed."""

import io
import os
import pickle
import struct
import zipfile
import zlib

PROTOCOL = b'\x80\x02'


def text(value):
  return b'X' + struct.pack('<I', len(value.encode())) + value.encode()


def integer(value):
  size = value.bit_length() // 8 + 1
  return b'\x8a' + bytes([size]) + value.to_bytes(size, 'little', signed=True)


def name(module, attribute):
  return b'c' + f'{module}\n{attribute}\n'.encode()


def storage(kind='FloatStorage', key='0', count=6, module='torch'):
  place = text('storage') + name(module, kind) + text(key) + text('cpu')
  return b'(' + place + integer(count) + b'tQ'


def sizes(values):
  return b'(' + b''.join(integer(value) for value in values) + b't'


def tensor(shape=(2, 3), strides=(3, 1), offset=0, rest=None, **storage_of):
  """The instructions of a tensor, right ones by default."""
  rest = b'\x89' + name('collections', 'OrderedDict') + b')R' + (rest or b'')
  return (
    name('torch._utils', '_rebuild_tensor_v2')
    + b'('
    + storage(**storage_of)
    + integer(offset)
    + sizes(shape)
    + sizes(strides)
    + rest
    + b'tR'
  )


def dict_of(**items):
  """A pickle of a dict of instructions."""
  pairs = b''.join(text(key) + value for key, value in items.items())
  return PROTOCOL + b'}(' + pairs + b'u.'


def pt(description, values=b'\x00' * 24, method=zipfile.ZIP_STORED, **members):
  """A `.pt` file of one storage; `members` are others, by name."""
  data = io.BytesIO()
  with zipfile.ZipFile(data, 'w', method) as archive:
    archive.writestr('a/data.pkl', description)
    archive.writestr('a/data/0', values)
    for member, content in members.items():
      archive.writestr(f'a/{member}', content)
  return data.getvalue()


class Reduced:
  """What pickles as a call."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


def programs(sentinel):
  """Pickles that make a file when Python's own machine runs them."""
  command = f'touch {sentinel}'
  code = f'open({str(sentinel)!r}, "w").close()'
  quoted = repr(command).encode()
  system = name('posix', 'system')
  evil = {
    'os.system': Reduced(os.system, command),
    'eval': Reduced(eval, code),
    'exec': Reduced(exec, code),
    'open': Reduced(open, str(sentinel), 'w'),
    'in a dict': {'weight': [1, {'bias': Reduced(os.system, command)}]},
    'as a key': {Reduced(os.system, command): 1},
    'in a tuple': ({}, Reduced(os.system, command)),
    'through getattr': Reduced(getattr, Reduced(__import__, 'os'), 'x', None),
  }
  made = {
    f'{key}, protocol {protocol}': pickle.dumps(value, protocol)
    for key, value in evil.items()
    for protocol in range(6)
    if key != 'through getattr'
  }
  getter = (
    name('builtins', 'getattr')
    + b'('
    + (name('builtins', '__import__') + text('os') + b'\x85R')
    + text('system')
    + b'tR'
  )
  return made | {
    'INST': b'(S' + quoted + b'\niposix\nsystem\n.',
    'OBJ': b'(' + system + b'S' + quoted + b'\no.',
    'getattr of an import': PROTOCOL + getter + text(command) + b'\x85R.',
    'STACK_GLOBAL': PROTOCOL
    + text('posix')
    + text('system')
    + b'\x93'
    + text(command)
    + b'\x85R.',
    'memo': PROTOCOL
    + system
    + b'q\x00'
    + text(command)
    + b'\x85q\x010h\x00h\x01R.',
    'before a state dict': PROTOCOL
    + system
    + text(command)
    + b'\x85R0'
    + dict_of(weight=b'K\x01')[2:],
  }


def deflated_member(size_said, packed, method=8, crc=0):
  """An archive of one .npy member whose directory says any size."""
  file_name = b'w.npy'
  local = struct.pack(
    '<4s5H3I2H', b'PK\x03\x04', 20, 0, method, 0, 0, crc, len(packed),
    min(size_said, 2**32 - 1), len(file_name), 0,
  ) + file_name  # fmt: skip
  extra = b''
  if size_said >= 2**32 - 1:
    extra = struct.pack('<2HQ', 1, 8, size_said)
  central = struct.pack(
    '<4s6H3I5H2I', b'PK\x01\x02', 20, 20, 0, method, 0, 0, crc, len(packed),
    min(size_said, 2**32 - 1), len(file_name), len(extra), 0, 0, 0, 0, 0,
  ) + file_name + extra  # fmt: skip
  body = local + packed
  end = struct.pack(
    '<4s4H2IH', b'PK\x05\x06', 0, 0, 1, 1, len(central), len(body), 0
  )
  return body + central + end


def npy(descr='<f4', shape='(2, 3)', order='False', values=b'\x00' * 24):
  header = (
    f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}"
  )
  header = header.encode() + b'\n'
  return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(header)) + header + values


def bomb(n_bytes):
  """An archive of an array of zeros that is deflated a thousandfold."""
  packer = zlib.compressobj(9, zlib.DEFLATED, -15)
  head = npy(shape=f'({n_bytes // 4},)', values=b'')
  packed, block = packer.compress(head), b'\x00' * 2**20
  for _ in range(n_bytes // len(block)):
    packed += packer.compress(block)
  packed += packer.flush()
  return deflated_member(len(head) + n_bytes, packed)


def with_entry(data, **fields):
  """An archive whose directory's first entry has other values."""
  at = data.rfind(b'PK\x01\x02')
  places = {'flags': 8, 'method': 10, 'packed': 20, 'size': 24, 'header': 42}
  data = bytearray(data)
  for field, value in fields.items():
    form = '<H' if field in ('flags', 'method') else '<I'
    struct.pack_into(form, data, at + places[field], value)
  return bytes(data)
