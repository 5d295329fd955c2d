"""Small files are whole or absent."""

from etils import epath
import pytest

from sae_jax import files

pytestmark = pytest.mark.fast


def test_writes_and_replaces(tmp_path):
  path = tmp_path / 'deep' / 'a.txt'
  files.write_text(path, 'one é')
  files.write_text(path, 'two')
  assert path.read_text() == 'two'
  assert [p.name for p in path.parent.iterdir()] == ['a.txt']


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'a.txt'
  files.write_text(path, 'old')
  whole = type(epath.Path(path)).write_bytes

  def half(self, data):
    whole(self, data[: len(data) // 2])
    raise OSError('disk full')

  monkeypatch.setattr(type(epath.Path(path)), 'write_bytes', half)
  with pytest.raises(OSError, match='disk full'):
    files.write_text(path, 'a longer text')
  monkeypatch.undo()
  assert path.read_text() == 'old'
