"""Files of tensors of other libraries, read by parts and written by blocks."""

import io
import json
import math
import os
import pathlib
import pickle
import pickletools
import tracemalloc
import zipfile

from etils.epath import testing as epath_testing
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sae_jax import errors
from sae_jax.interchange.files import pt_writer, reading
from sae_jax.storage import safetensors as st
from sae_jax.storage import tensors as tensors_lib

GOLDEN = pathlib.Path(__file__).parent.parent / 'data/interchange/files'
TYPES = {
  'float64': np.float64,
  'float32': np.float32,
  'float16': np.float16,
  'bfloat16': ml_dtypes.bfloat16,
  'int64': np.int64,
  'int32': np.int32,
  'int16': np.int16,
  'int8': np.int8,
  'uint8': np.uint8,
  'bool': np.bool_,
}


def refused(url):
  with pytest.raises(errors.UserError) as error:
    reading.open_tensors(url)
  assert str(error.value).isprintable()
  return str(error.value)


@pytest.mark.parametrize(
  'stored', ['views.pt', 'protocol4.pt', 'legacy.pt', 'types.safetensors']
)
def test_what_other_libraries_wrote(stored):
  file = reading.open_tensors(GOLDEN / stored)
  expected = np.load(GOLDEN / 'expected.npz')
  is_pt = stored.endswith('.pt')
  assert set(file.tensors) == set(expected if is_pt else TYPES)
  for key, tensor in file.tensors.items():
    values = tensor.read()
    assert values.shape == tensor.shape == expected[key].shape
    assert values.dtype == tensor.dtype
    np.testing.assert_array_equal(values.astype(np.float64), expected[key])
  for name, kind in TYPES.items():
    assert file.tensors[name].dtype == kind
  assert file.kind == ('pt' if is_pt else 'safetensors')
  if is_pt:
    assert file.values == {
      'inner': {},
      'step': 2**40,
      'rate': 0.5,
      'words': ['a', None, True],
      'name': 'é',
    }


def test_what_is_no_dict_of_tensors():
  assert 'names torch.nn.modules.linear.Linear, which no dict of tensors' in (
    refused(GOLDEN / 'module.pt')
  )
  assert 'it holds a tensor, not a dict' in refused(GOLDEN / 'tensor.pt')
  assert 'some of its values may be the same ones' in (
    refused(GOLDEN / 'expanded.pt')
  )


def test_numpys_archives(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {
    'plain': rng.normal(size=(7, 5)),
    'fortran': np.asfortranarray(rng.normal(size=(3, 4, 2)).astype('f')),
    'scalar': np.float32(2.5),
    'empty': np.zeros((0, 3), np.int8),
    'flags': np.array([True, False]),
  }
  for save in (np.savez, np.savez_compressed):
    save(tmp_path / 'a.npz', **arrays)
    file = reading.open_tensors(tmp_path / 'a.npz')
    assert file.kind == 'npz' and set(file.tensors) == set(arrays)
    for name, array in arrays.items():
      np.testing.assert_array_equal(file.tensors[name].read(), array)
    part = file.tensors['fortran'].T.read(1, 2)
    np.testing.assert_array_equal(part, arrays['fortran'].T[1:2])
  np.savez(tmp_path / 'b.npz', plain=np.array([{'a': 1}, print]))
  assert "an array of the type '|O'" in refused(tmp_path / 'b.npz')
  np.savez(tmp_path / 'c.npz', plain=arrays['plain'].astype('>f8'))
  assert "an array of the type '>f8'" in refused(tmp_path / 'c.npz')


@pytest.mark.parametrize('seed', range(20))
def test_parts_of_strided_tensors(seed, monkeypatch):
  """Every way of reading is taken, by limits that a small array exceeds."""
  rng = np.random.default_rng(seed)
  monkeypatch.setattr(tensors_lib, '_PIECE', int(rng.choice([8, 64, 2**20])))
  monkeypatch.setattr(tensors_lib, '_RUN', int(rng.choice([1, 16, 4096])))
  base = rng.integers(0, 2**15, rng.integers(1, 9, 3)).astype('<i2')
  steps = tuple(slice(None, None, int(n)) for n in rng.integers(1, 3, 3))
  view = base[steps].transpose(rng.permutation(3))
  tensor = tensors_lib.stored(
    lambda: io.BytesIO(b'head' + base.tobytes()),
    4,
    view.shape,
    base.dtype,
    'it',
    [step // 2 for step in view.strides],
  )
  np.testing.assert_array_equal(tensor.read(), view)
  for start in range(view.shape[0] + 1):
    np.testing.assert_array_equal(
      tensor.read(start, start + 2), view[start:][:2]
    )
  np.testing.assert_array_equal(tensor.T.read(1, 3), view.T[1:3])
  blocks = list(tensor.blocks(view[:1].nbytes * 2))
  assert all(len(block) <= 2 for block in blocks)
  np.testing.assert_array_equal(np.concatenate(blocks), view)


def test_a_part_of_a_file_larger_than_memory(tmp_path):
  """A file of 64 GiB, of which the disk holds no block that is all zeros."""
  shape = (2**16, 2**18)
  header = {
    'w': {
      'dtype': 'F32',
      'shape': shape,
      'data_offsets': [0, 4 * math.prod(shape)],
    }
  }
  text = json.dumps(header).encode()
  start = 8 + len(text)
  with open(tmp_path / 'a.safetensors', 'wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    file.seek(start + 4 * (40_000 * shape[1] + 7))
    file.write(np.float32(3).tobytes())
    file.truncate(start + 4 * math.prod(shape))
  tracemalloc.start()
  tensor = reading.open_tensors(tmp_path / 'a.safetensors').tensors['w']
  rows = tensor.read(40_000, 40_002)
  columns = tensor.T.part(((0, 4096), (39_990, 40_010)))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert rows[0, 7] == 3 and rows.sum() == 3
  assert columns[7, 10] == 3 and columns.sum() == 3
  assert peak < 2 * rows.nbytes + 2**24 + 2**22


def some_tensors():
  rng = np.random.default_rng(0)
  arrays = {
    'weight': rng.normal(size=(6, 5)).astype('f'),
    'half': rng.normal(size=(3, 7)).astype(ml_dtypes.bfloat16),
    'count': np.arange(3),
    'flags': np.array([True, False, True]),
    'scalar': np.float32(2.5),
    'empty': np.zeros((0, 4), 'f'),
  }
  return arrays, {k: tensors_lib.from_array(x) for k, x in arrays.items()}


def test_what_is_written_as_safetensors(tmp_path):
  arrays, tensors = some_tensors()
  tensors['turned'] = tensors['weight'].T
  arrays['turned'] = arrays['weight'].T
  path = tmp_path / 'deep/a.safetensors'
  st.write(path, tensors, {'origin': 'é'})
  theirs = safetensors.numpy.load_file(path)
  ours = reading.open_tensors(path)
  assert set(theirs) == set(ours.tensors) == set(arrays)
  assert ours.values == {'origin': 'é'}
  for name, array in arrays.items():
    np.testing.assert_array_equal(theirs[name], array)
    np.testing.assert_array_equal(ours.tensors[name].read(), array)
    assert theirs[name].dtype == ours.tensors[name].dtype == array.dtype


class Unpickler(pickle.Unpickler):
  """Python's machine, with stand-ins for what PyTorch's pickles name."""

  def find_class(self, module, name):
    if (module, name) == ('collections', 'OrderedDict'):
      return dict
    assert module in ('torch', 'torch._utils')
    return name if name.endswith('Storage') else lambda *call: (name, *call)

  def persistent_load(self, pid):
    return pid


def test_what_is_written_as_pt(tmp_path, monkeypatch):
  arrays, tensors = some_tensors()
  plain = {'k': 32, 'big': 2**40, 'low': -3, 'words': ['a', (1, 0.5), None]}
  content = {**tensors, 'state': plain | {'on': True, 'half': tensors['half']}}
  # With and without the headers of members that are larger than 2 GiB.
  for limit in (zipfile.ZIP64_LIMIT, 40):
    monkeypatch.setattr(zipfile, 'ZIP64_LIMIT', limit)
    path = tmp_path / 'a.pt'
    pt_writer.write(path, content)
    file = reading.open_tensors(path)
    assert file.values == {'state': plain | {'on': True}}
    for name, array in (arrays | {'state.half': arrays['half']}).items():
      assert file.tensors[name].dtype == array.dtype
      np.testing.assert_array_equal(file.tensors[name].read(), array)
    with zipfile.ZipFile(path) as archive:
      assert archive.testzip() is None
      infos = archive.infolist()
      description = archive.read('archive/data.pkl')
      values = [archive.read(f'archive/data/{i}') for i in range(7)]
    whole = path.read_bytes()
    for info, data in zip(infos[2:-1], values):
      assert whole.find(data, info.header_offset) % 64 == 0 or not data
    assert {op.proto for op, _, _ in pickletools.genops(description)} <= {
      0,
      1,
      2,
    }
    theirs = Unpickler(io.BytesIO(description)).load()
    name, pid, offset, shape, strides, needs_grad, hooks = theirs['half']
    assert (name, pid) == (
      '_rebuild_tensor_v2',
      ('storage', 'BFloat16Storage', '1', 'cpu', 21),
    )
    assert (offset, shape, strides, needs_grad, hooks) == (
      0, (3, 7), (7, 1), False, {}
    )  # fmt: skip
    assert values[1] == arrays['half'].tobytes()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
  arrays, tensors = some_tensors()
  short = tensors_lib.Tensor(
    (4, 5), np.dtype('f'), lambda ranges: arrays['weight']
  )
  for path, write in (
    (tmp_path / 'a.safetensors', st.write),
    (tmp_path / 'a.pt', pt_writer.write),
  ):
    write(path, {'a': tensors['count']})
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=r'gave 120 bytes, not 80'):
      write(path, {'a': tensors['weight'], 'b': short})
    with pytest.raises(ValueError, match='complex64'):
      write(path, {'a': tensors_lib.from_array(np.zeros(3, np.complex64))})
    assert path.read_bytes() == whole
  assert len(list(tmp_path.iterdir())) == 2


def test_an_index_of_several_files(tmp_path):
  arrays, tensors = some_tensors()
  st.write(tmp_path / '1.safetensors', {'weight': tensors['weight']})
  st.write(tmp_path / '2.safetensors', {'count': tensors['count']})
  path = tmp_path / 'model.safetensors.index.json'

  def index(**file_of):
    path.write_text(json.dumps({'weight_map': file_of}))
    return path

  whole = index(weight='1.safetensors', count='2.safetensors')
  file = reading.open_tensors(whole)
  np.testing.assert_array_equal(file.tensors['count'].read(), arrays['count'])
  assert set(file.tensors) == {'weight', 'count'}
  assert 'has no tensor x, which' in refused(index(x='1.safetensors'))
  assert 'no file at' in refused(index(x='3.safetensors'))
  assert 'no plain file name' in refused(index(x='../1.safetensors'))


def test_places_that_are_no_file(tmp_path):
  assert 'is a folder' in refused(tmp_path)
  assert 'no file at' in refused(tmp_path / 'none')
  (tmp_path / 'empty').write_bytes(b'')
  assert '(0 bytes, the first are' in refused(tmp_path / 'empty')
  (tmp_path / 'gone').symlink_to(tmp_path / 'none')
  assert 'no file at' in refused(tmp_path / 'gone')
  (tmp_path / 'round').symlink_to(tmp_path / 'round')
  assert 'no file at' in refused(tmp_path / 'round')
  (tmp_path / 'endless').symlink_to('/dev/zero')
  assert 'no file at' in refused(tmp_path / 'endless')
  os.mkfifo(tmp_path / 'pipe')
  assert 'no file at' in refused(tmp_path / 'pipe')
  (tmp_path / 'link.txt').symlink_to(GOLDEN / 'views.pt')
  assert reading.open_tensors(tmp_path / 'link.txt').kind == 'pt'
  assert 'no file at' in refused(str(tmp_path / 'a\x00b'))
  assert 'no URL that is known' in refused('ftp://a/b')
  for content, words in (
    (b'<!DOCTYPE html>', 'of no known'),
    (b'version https://git-lfs.github.com/spec/v1\n', 'a pointer of Git LFS'),
    (pickle.dumps({'a': 1}), 'is a pickle, which would have to be run'),
    (b'\x93NUMPY\x01\x00v\x00{', 'is a single array'),
    (b'GGUF\x03\x00', 'is a language model'),
    (b'{"a": 1}', 'no weight_map'),
  ):
    (tmp_path / 'odd').write_bytes(content)
    words = words.replace('of no known', 'no file of tensors that is known')
    assert words in refused(tmp_path / 'odd')


def test_files_in_a_bucket():
  def moved(original, url, *args, **kwargs):
    return original(str(url).replace('gs://bucket', str(GOLDEN)), *args)

  with epath_testing.mock_epath(open=moved, exists=moved, isdir=moved):
    for name in ('views.pt', 'legacy.pt', 'types.safetensors'):
      file = reading.open_tensors(f'gs://bucket/{name}')
      here = reading.open_tensors(GOLDEN / name)
      for key, tensor in file.tensors.items():
        np.testing.assert_array_equal(tensor.read(), here.tensors[key].read())


def test_rows_of_a_file_that_has_the_columns_together(tmp_path, monkeypatch):
  array = np.random.default_rng(0).normal(size=(300, 40)).astype('f')
  path = tmp_path / 'a.safetensors'
  st.write(path, {'w': tensors_lib.from_array(array)})
  stored = reading.open_tensors(path).tensors['w']
  read = []

  def part(ranges):
    read.append(stored.part(ranges))
    return read[-1]

  turned = tensors_lib.Tensor(stored.shape, stored.dtype, part).T
  assert tensors_lib.by_rows(turned) is turned
  # Of the 48,000 bytes a block has 2,400.
  monkeypatch.setattr(tensors_lib, '_BLOCK', 2400)
  monkeypatch.setattr(tensors_lib, '_LITTLE', 10_000)
  copied = tensors_lib.by_rows(turned)
  assert read == []
  for _ in range(2):
    rows = np.concatenate(list(copied.blocks(2400)))
    np.testing.assert_array_equal(rows, array.T)
    assert len(read) == 20 and sum(x.nbytes for x in read) == array.nbytes
  np.testing.assert_array_equal(copied.T.read(5, 9), array[5:9])
  # Where the pieces of a block are long enough there is no copy.
  monkeypatch.setattr(tensors_lib, '_RUN', 8)
  assert tensors_lib.by_rows(turned) is turned
