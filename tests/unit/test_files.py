"""Small files are whole or absent; a folder has one user."""

from etils import epath
import pytest

from sae_jax import errors
from sae_jax.storage import claim, files


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
    raise OSError(28, 'disk full')

  monkeypatch.setattr(type(epath.Path(path)), 'write_bytes', half)
  with pytest.raises(OSError, match=f"disk full: '{path}'"):
    files.write_text(path, 'a longer text')
  monkeypatch.undo()
  assert path.read_text() == 'old'
  # A full disk needs the room.
  assert [p.name for p in tmp_path.iterdir()] == ['a.txt']


def test_a_stream_is_whole_or_absent(tmp_path):
  path = tmp_path / 'deep' / 'a'

  def write(file):
    file.write(b'old')
    file.seek(1)
    file.write(b'ne')

  files.write_stream(path, write)
  assert path.read_bytes() == b'one' and files.size(path, 'a') == 3

  def half(file):
    file.write(b'a longer text')
    raise OSError(28, 'disk full')

  with pytest.raises(OSError, match=f"disk full: '{path}'"):
    files.write_stream(path, half)
  assert path.read_bytes() == b'one'
  assert [p.name for p in path.parent.iterdir()] == ['a']


def test_a_claimed_folder_is_refused_until_it_is_let_go(tmp_path):
  folder = str(tmp_path / 'deep' / 'run')
  with claim.claim(folder):
    with (
      pytest.raises(
        errors.UserError, match='run is in use by another process: wait'
      ),
      claim.claim(folder),
    ):
      pass
    # Another folder is another claim, also one inside.
    with claim.claim(f'{folder}/inner'):
      pass
  with pytest.raises(OSError, match='gone wrong'), claim.claim(folder):
    raise OSError('gone wrong')
  with claim.claim(folder):
    pass


def test_buckets_are_not_claimed():
  with claim.claim('gs://none/run'), claim.claim('gs://none/run'):
    pass
