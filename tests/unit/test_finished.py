"""Only results that are whole, and of these inputs, are finished."""

import re

import pytest

from sae_jax import errors
from sae_jax.storage import finished

CONTENTS = {'report.json': b'{"nmse": 0.25}', 'data.bin': b'PK' * 40}
MADE_FROM = {'inputs': {'seed': 0}, 'versions': {'sae_jax': '1'}}
NAMES = re.compile(r'report\.json|data\.bin')


@pytest.fixture
def folder(tmp_path):
  for name, data in CONTENTS.items():
    (tmp_path / name).write_bytes(data)
  digests = {name: finished.sha256(data) for name, data in CONTENTS.items()}
  finished.write(tmp_path, MADE_FROM, digests)
  return tmp_path


def vouches(folder, made_from=MADE_FROM):
  return finished.vouches(folder, made_from, NAMES)


def test_files_are_read_as_they_were_written(folder):
  assert vouches(folder)
  for name, data in CONTENTS.items():
    assert finished.read(folder, name, 'sae-x') == data


@pytest.mark.parametrize('name', CONTENTS)
def test_a_damaged_file_is_named(folder, name):
  data = bytearray(CONTENTS[name])
  data[7] ^= 1
  (folder / name).write_bytes(data)
  assert not vouches(folder)
  with pytest.raises(errors.UserError) as raised:
    finished.read(folder, name, 'sae-x')
  assert str(raised.value) == (
    f'{folder / name} is not as sae-x wrote it, by its digest in '
    'finished.json: run sae-x again'
  )
  (folder / name).unlink()
  assert not vouches(folder)
  with pytest.raises(errors.UserError, match=f'{name} is not there: run'):
    finished.read(folder, name, 'sae-x')


def test_a_damaged_record_vouches_for_nothing(folder):
  record = folder / finished.NAME
  sound = record.read_bytes()
  for data in (b'', b'[]', b'{"files": []}', sound[:-20], b'\xff' + sound):
    record.write_bytes(data)
    assert not vouches(folder)
    with pytest.raises(errors.UserError, match='run sae-x again'):
      finished.read(folder, 'report.json', 'sae-x')
  finished.remove(folder)
  assert not vouches(folder)
  with pytest.raises(errors.UserError, match=r'has no finished\.json: give'):
    finished.read(folder, 'report.json', 'sae-x')


def test_other_inputs_and_versions_are_not_vouched_for(folder):
  for key, value in (('inputs', {'seed': 1}), ('versions', {'sae_jax': '2'})):
    assert not vouches(folder, MADE_FROM | {key: value})
  assert vouches(folder)


def test_no_file_outside_of_the_folder_is_looked_at(folder, tmp_path):
  (tmp_path.parent / 'report.json').write_bytes(b'x')
  digests = {'../report.json': finished.sha256(b'x')}
  finished.write(folder, MADE_FROM, digests)
  assert not vouches(folder)
  # Nor does a record of no files vouch for anything.
  finished.write(folder, MADE_FROM, {})
  assert not vouches(folder)
