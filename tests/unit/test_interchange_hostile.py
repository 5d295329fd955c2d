"""Files that lie about their sizes, or would run code: refused in one line."""

import contextlib
import json
import math
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from sae_jax import errors
from sae_jax.interchange.files import archive, pickles, pt, reading
from tests.support import hostile_files as hostile

SENTINEL = 'ran'
NAMES = tuple(hostile.programs(SENTINEL))


def opened(path, data):
  (path / 'a').write_bytes(data)
  return reading.open_tensors(path / 'a')


def refused(path, data):
  """The line in which a file is refused, whether opened or read."""
  with pytest.raises(errors.UserError) as error:
    for tensor in opened(path, data).tensors.values():
      tensor.read()
  line = str(error.value)
  assert line.isprintable() and len(line) < 1100
  assert str(path / 'a') in line
  return line


@pytest.mark.parametrize('name', NAMES)
def test_no_program_is_run(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  program = hostile.programs(SENTINEL)[name]
  for data in (
    hostile.pt(program),
    pt.LEGACY + b'\x80\x02M\xe9\x03.' * 2 + program,
    pt.LEGACY + program,
    hostile.pt(hostile.dict_of(w=program.removesuffix(b'.')[2:])),
    program,
  ):
    refused(tmp_path, data)
  # An array of objects, as which numpy would run it.
  with zipfile.ZipFile(tmp_path / 'a', 'w') as archive:
    archive.writestr('w.npy', hostile.npy('|O', '(1,)', values=program))
  with pytest.raises(errors.UserError, match=r'the type .\|O., none of'):
    reading.open_tensors(tmp_path / 'a')
  assert not (tmp_path / SENTINEL).exists()
  # Control: Python's own machine runs it.
  with contextlib.suppress(Exception):
    pickle.loads(program)
  assert (tmp_path / SENTINEL).exists()


def test_a_refused_program_is_named(tmp_path):
  program = hostile.programs(SENTINEL)['os.system, protocol 2']
  assert refused(tmp_path, hostile.pt(program)) == (
    f'{tmp_path / "a"} is not read as a file of tensors '
    f'({len(hostile.pt(program)):,} bytes, it names posix.system, which no '
    'dict of tensors needs and which is not called): get it again, or save it '
    'again with torch.save(module.state_dict(), path), or as safetensors'
  )


SYSTEM = hostile.name('posix', 'system')
REBUILD = hostile.name('torch._utils', '_rebuild_tensor_v2')
ORDERED = hostile.name('collections', 'OrderedDict')
DICT = hostile.dict_of
ODD_PICKLES = {
  'a storage of a function': (
    DICT(w=hostile.tensor(kind='system', module='posix')),
    'names posix.system',
  ),
  'a storage of no type': (
    DICT(w=hostile.tensor(kind='Size')),
    'a storage of no known type',
  ),
  'a reference to a file': (
    DICT(w=hostile.text('/etc/passwd') + b'Q'),
    'a str stands where a tuple should',
  ),
  'another reference': (
    DICT(w=b'(' + hostile.text('module') + b'tQ'),
    'a reference that is to no storage',
  ),
  'a name as a value': (DICT(w=ORDERED), 'a name stands for a value'),
  'a storage as a value': (DICT(w=hostile.storage()), 'a storage stands for'),
  'a call of a text': (DICT(w=hostile.text('x') + b')R'), 'calls a str'),
  'a call of a result': (DICT(w=ORDERED + b')R)R'), 'calls a dict'),
  'wrong arguments': (DICT(w=REBUILD + b')R'), '_tensor_v2 wrongly'),
  'a method by its path': (
    DICT(w=hostile.name('torch._utils', '_rebuild_tensor_v2.__globals__')),
    'names torch._utils._rebuild_tensor_v2.__globals__',
  ),
  'a state of no dict': (DICT(w=b']K\x01b'), 'a list stands where a dict'),
  'a hook': (
    DICT(w=hostile.tensor(rest=b'}' + hostile.text('a') + b'K\x01s')),
    'has hooks or metadata',
  ),
  'a storage that is absent': (DICT(w=hostile.tensor(key='7')), 'is absent'),
  'a storage by a path': (
    DICT(w=hostile.tensor(key='../data.pkl')),
    'is absent',
  ),
  'too many values': (DICT(w=hostile.tensor(count=7)), 'which have 24 bytes'),
  'of 2^62 values': (
    DICT(w=hostile.tensor((2**62,), (1,), count=2**62)),
    'which have 24 bytes',
  ),
  'sizes whose product overflows': (
    DICT(w=hostile.tensor((2**62, 4), (4, 1))),
    'needs value',
  ),
  'a size of 2^63': (DICT(w=hostile.tensor((2**63,), (1,))), 'a size is 9223'),
  'a size below zero': (DICT(w=hostile.tensor((-1,), (1,))), 'a size is -1'),
  'a stride below zero': (DICT(w=hostile.tensor((2,), (-1,))), 'a size is -1'),
  'an offset below zero': (DICT(w=hostile.tensor(offset=-1)), 'a size is -1'),
  'an offset too far': (DICT(w=hostile.tensor(offset=1)), 'needs value 6'),
  'a stride of 0': (DICT(w=hostile.tensor((9, 2), (0, 1))), 'the same ones'),
  'strides that overlap': (
    DICT(w=hostile.tensor((2, 3), (2, 1))),
    'the same ones',
  ),
  'a stride too far': (DICT(w=hostile.tensor(strides=(4, 1))), 'needs value'),
  'more sizes than strides': (DICT(w=hostile.tensor((2, 3), (1,))), '2 sizes'),
  'many axes': (DICT(w=hostile.tensor((1,) * 99, (1,) * 99)), '99 sizes'),
  'a bool as a size': (
    DICT(w=hostile.tensor(()).replace(b'(t(', b'(\x88t(')),
    'a size is True',
  ),
  'a name twice': (
    b'}(' + hostile.text('w') + b'N' + hostile.text('w') + b'Nu.',
    "the key 'w' twice",
  ),
  'one name of two tensors': (
    b'}('
    + hostile.text('a.b')
    + hostile.tensor()
    + hostile.text('a')
    + b'}'
    + hostile.text('b')
    + hostile.tensor()
    + b'su.',
    'two tensors of the name a.b',
  ),
  'a key that is no text': (b'}K\x01K\x01s.', 'a key of the type int'),
  'nothing': (b'', 'it ends early'),
  'no end': (b'}', 'it ends early'),
  'a text that is too long': (b'X\xff\xff\xff\x7fa.', 'a text of 2,147'),
  'a text that is cut': (b'X\x09\x00\x00\x00a.', 'it ends early'),
  'no UTF-8': (b'}X\x01\x00\x00\x00\xffNs.', 'utf-8'),
  'a long integer': (b'\x8a\xff' + b'\x01' * 255 + b'.', 'an integer of 255'),
  'an empty stack': (b'R.', 'takes what it has not made'),
  'below a mark': (b'}(s.', 'takes what it has not made'),
  'no mark': (b'}u.', 'a mark that it has not made'),
  'a mark too many': (b'(}.', 'more than one value'),
  'two values': (b'}}.', 'more than one value'),
  'half a pair': (b'}(' + hostile.text('a') + b'u.', 'a key without a value'),
  'a memo that is empty': (b'h\x07.', 'recalls value 7'),
  'inside itself': (b']q\x00h\x00a.', 'nested more than 32'),
  'nested deeply': (b']' * 60_000 + b'a' * 59_999 + b'.', 'more than 32 deep'),
  'shared a billion times': (
    b'](](NNNNNNNNNNe'
    + b''.join(b'q%c](' % i + b'h%c' % i * 10 + b'e' for i in range(1, 10))
    + b'e.',
    'more than 262,144 values',
  ),
  'endless instructions': (b'N0' * 10 + b'N' * 2**19, 'instruction 0x30'),
  'many instructions': (b'N' * 2**19, 'more than 131,072 inst'),
  'a whole program behind it': (b'}.cposix\nsystem\n', 'something follows'),
}  # fmt: skip


@pytest.mark.parametrize('name', ODD_PICKLES)
def test_odd_descriptions(name, tmp_path):
  description, words = ODD_PICKLES[name]
  assert words in refused(tmp_path, hostile.pt(description))


def test_control_a_right_description_is_read(tmp_path):
  values = np.arange(6, dtype='f')
  file = opened(
    tmp_path, hostile.pt(DICT(w=hostile.tensor()), values.tobytes())
  )
  np.testing.assert_array_equal(file.tensors['w'].read(), values.reshape(2, 3))
  turned = hostile.pt(DICT(w=hostile.tensor((3, 2), (1, 3))), values.tobytes())
  np.testing.assert_array_equal(
    opened(tmp_path, turned).tensors['w'].read(), values.reshape(2, 3).T
  )


def test_the_machine_needs_little_memory(monkeypatch):
  """The most that instructions of any kind make, of an eighth of all."""
  monkeypatch.setattr(pickles, '_MOST_STEPS', pickles._MOST_STEPS // 8)
  tracemalloc.start()
  for one in (b'}', b']', b'(', b'G' + b'\x00' * 8, b'}(K\x01'):
    data = one * (pickles.LONGEST // len(one))
    with pytest.raises(ValueError, match='instructions'):
      pickles.load(data)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  # The text of one and that of the next.
  assert peak < 2 * pickles.LONGEST + 2**22


GOOD = DICT(w=hostile.tensor())
ODD_ARCHIVES = {
  'big endian': (hostile.pt(GOOD, byteorder=b'big'), "byte order is 'big'"),
  'TorchScript': (hostile.pt(GOOD, **{'constants.pkl': b''}), 'TorchScript'),
  'deflated values': (
    hostile.pt(GOOD, method=zipfile.ZIP_DEFLATED),
    'are deflated',
  ),
  'another packer': (hostile.pt(GOOD, method=zipfile.ZIP_LZMA), 'method 14'),
  'encrypted': (hostile.with_entry(hostile.pt(GOOD), flags=1), 'is encrypted'),
  'larger than it is': (
    hostile.with_entry(hostile.pt(GOOD), size=2**31),
    'would have 2,147,483,648 bytes',
  ),
  'behind the end': (
    hostile.with_entry(hostile.pt(GOOD), header=2**31),
    'overlaps',
  ),
  'over another': (
    hostile.with_entry(hostile.pt(GOOD), header=0, packed=24, size=24),
    'overlaps',
  ),
  'moved': (
    hostile.pt(GOOD).replace(b'a/data/0', b'a/data/1', 1),
    'not where it should be',
  ),
  'nothing in it': (b'PK\x03\x04' + b'\x00' * 60, 'no end record'),
  'no description': (
    hostile.pt(GOOD).replace(b'data.pkl', b'data.pkx'),
    'neit',
  ),
  'two roots': (
    hostile.pt(GOOD, **{'../b/data.pkl': GOOD}),
    'has 2 descriptions',
  ),
  'a member of 2^63 bytes': (
    hostile.deflated_member(2**63, b'x' * 100),
    'would have 9,223,372,036,854,775,808 bytes, made of 100',
  ),
  'no deflated data': (
    hostile.deflated_member(100, b'\xff' * 100),
    'is damaged',
  ),
  'an array of 2^60': (
    hostile.deflated_member(4, hostile.npy(shape='(1152921504606846976,)'), 0),
    'would have',
  ),
  'an array that is short': (
    hostile.deflated_member(
      len(hostile.npy(shape='(2, 4)')), hostile.npy(shape='(2, 4)'), 0
    ),
    'has 24 bytes',
  ),
}


@pytest.mark.parametrize('name', ODD_ARCHIVES)
def test_odd_archives(name, tmp_path):
  data, words = ODD_ARCHIVES[name]
  assert words in refused(tmp_path, data)


def test_an_array_that_is_not_as_numpy_writes_it(tmp_path):
  for odd in (
    hostile.npy(shape='(2, 3) + __import__("os").system("touch ran")'),
    hostile.npy(shape='(-2, 3)'),
    hostile.npy(shape='(2.0, 3)'),
    hostile.npy(order='None'),
    hostile.npy(descr="', 'x': '"),
    b'\x93NUMPY\x01\x00\xff\xff' + b'(' * 65535,
    b'\x93NUMPY\x03\x00' + b' ' * 40,
    b'\x93NUMPY',
  ):
    assert refused(tmp_path, hostile.deflated_member(len(odd), odd, 0))
  whole = hostile.npy()
  file = opened(tmp_path, hostile.deflated_member(len(whole), whole, 0))
  assert file.tensors['w'].read().shape == (2, 3)


def test_bombs(tmp_path, monkeypatch):
  """A large member of zeros alone is refused, a small one read by parts."""
  monkeypatch.setattr(archive, '_LARGE', 2**23)
  monkeypatch.setattr(archive, '_PIECE', 2**16)
  assert 'would have 16,777,' in refused(tmp_path, hostile.bomb(2**24))
  file = opened(tmp_path, hostile.bomb(2**22))
  tracemalloc.start()
  part = file.tensors['w'].read(1_000_000, 1_000_010)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert part.shape == (10,)
  assert peak < 2**19


def header(entries, data=b'\x00' * 24, length=None):
  content = (
    entries if isinstance(entries, bytes) else json.dumps(entries).encode()
  )
  length = len(content) if length is None else length
  return struct.pack('<Q', length) + content + data


def entry(dtype='F32', shape=(2, 3), offsets=(0, 24)):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}


ODD_HEADERS = {
  'a length of 2^63': (header({}, length=2**63), '9,223,372,036,854,775,808'),
  'a length beyond the end': (header({}, length=99), 'would have 99 bytes'),
  'no JSON': (header(b'{"w": ]'), 'is not JSON'),
  'nested deeply': (header(b'{"w":' + b'[' * 10_000), 'is nested'),
  'a name twice': (
    header(
      b'{"w":' + json.dumps(entry()).encode() + b',"w":'
      + json.dumps(entry()).encode() + b'}'
    ),
    "the key 'w' twice",
  ),
  'no entry': (header({'w': 3}), 'no entry of dtype'),
  'no offsets': (header({'w': {'dtype': 'F32', 'shape': []}}), 'no entry of'),
  'an odd type': (header({'w': entry('C64')}), "of the type 'C64'"),
  'a type that is a list': (header({'w': entry(['F32'])}), 'of the type'),
  'a size below zero': (header({'w': entry(shape=(-2, -3))}), 'no shape'),
  'a size that is a float': (header({'w': entry(shape=(2.0, 3))}), 'no shape'),
  'a size that is true': (header({'w': entry(shape=(True, 6))}), 'no shape'),
  'a size of 2^63': (header({'w': entry(shape=(2**63,))}), 'no shape'),
  'an overflow': (
    header({'w': entry(shape=(2**62, 4, 6))}),
    'F32 of (4611686018427387904, 4, 6), has 24 bytes',
  ),
  'a hundred axes': (header({'w': entry(shape=(1,) * 100)}), 'no shape'),
  'offsets backwards': (header({'w': entry(offsets=(24, 0))}), 'has -24 bytes'),
  'offsets beyond': (header({'w': entry(offsets=(24, 48))}), 'at byte 24'),
  'an overlap': (
    header({'v': entry(shape=(3,), offsets=(0, 12)), 'w': entry()}),
    'begins at byte 0',
  ),
  'a gap': (
    header({'w': entry(offsets=(4, 28))}, b'\x00' * 28),
    'begins at byte 4 of the data, not at 0',
  ),
  'bytes behind it': (header({'w': entry()}, b'\x00' * 25), 'file has 25'),
  'bytes missing': (header({'w': entry()}, b'\x00' * 20), 'file has 20'),
  'odd metadata': (header({'__metadata__': {'a': 1}}, b''), 'of texts'),
}  # fmt: skip


@pytest.mark.parametrize('name', ODD_HEADERS)
def test_odd_headers(name, tmp_path):
  data, words = ODD_HEADERS[name]
  assert words in refused(tmp_path, data)


def test_control_a_right_header_is_read(tmp_path):
  data = header({'w': entry(), '__metadata__': {'a': 'b'}})
  file = opened(tmp_path, data)
  assert file.tensors['w'].read().shape == (2, 3) and file.values == {'a': 'b'}
  assert math.prod(file.tensors['w'].shape) == 6


def test_a_file_that_is_cut_after_it_was_opened(tmp_path):
  for data in (
    header({'w': entry()}),
    hostile.pt(GOOD),
    hostile.deflated_member(len(hostile.npy()), hostile.npy(), 0),
  ):
    file = opened(tmp_path, data)
    (tmp_path / 'a').write_bytes(data[:60])
    with pytest.raises(errors.UserError, match=r'too early|where it should be'):
      file.tensors['w'].read()
    (tmp_path / 'a').unlink()
    with pytest.raises(errors.UserError, match='cannot be read'):
      file.tensors['w'].read()


def test_pickles_of_numbers_are_what_python_makes_of_them():
  for value in (0, 1, 255, 256, 2**31, -1, -(2**40), 0.1, '', 'é', None, True):
    for protocol in (2, 4):
      ours, end = pickles.load(pickle.dumps({'a': [value]}, protocol))
      assert ours == {'a': [value]} and type(ours['a'][0]) is type(value)
      assert end == len(pickle.dumps({'a': [value]}, protocol))
