"""Names that are read from data and would reach files of other folders."""

import json
import os

from etils.epath import testing as epath_testing
import pytest

from sae_jax import errors, subject
from sae_jax.store import layout
from tests.support import hf_folder

LLAMA = 'llama 3 stretched positions'


def attack(folder, name):
  """A model of two files whose index names a file elsewhere for one."""
  url = hf_folder.write(folder / 'm', hf_folder.golden()[LLAMA], n_files=2)
  path = folder / 'm/model.safetensors.index.json'
  index = json.loads(path.read_text())
  for tensor, file in index['weight_map'].items():
    if file.endswith('00001-of-00002.safetensors'):
      index['weight_map'][tensor] = name
  path.write_text(json.dumps(index))
  return url


@pytest.mark.parametrize('is_remote', [True, False])
@pytest.mark.parametrize(
  'name', ['{victim}', '../' * 12 + '{victim}', '../x', '', '.', 7, None]
)
def test_an_index_names_no_file_outside_its_folder(name, is_remote, tmp_path):
  victim = tmp_path / 'victim.txt'
  victim.write_text('precious')
  if isinstance(name, str):
    name = name.format(victim=victim)
  url = attack(tmp_path, name)
  opened = []

  def moved(original, url, *args, **kwargs):
    opened.append(str(url))
    return original(str(url).replace('gs://bucket', str(tmp_path)), *args)

  if is_remote:
    url = 'gs://bucket/m'
  with (
    epath_testing.mock_epath(open=moved, exists=moved, isdir=moved),
    pytest.raises(errors.UserError) as error,
  ):
    subject.load(url)
  assert str(error.value).startswith(
    f'{url}/model.safetensors.index.json names the file {name!r}, which is no '
    'plain file name'
  )
  assert victim.read_text() == 'precious'
  assert not [path for path in opened if 'victim' in path]


def test_a_copy_has_a_name_of_its_own(tmp_path, monkeypatch):
  url = hf_folder.write(tmp_path / 'm', hf_folder.golden()[LLAMA], n_files=2)
  copies = []
  read = subject.folder.safetensors.read

  def noted(path, name):
    copies.append(os.path.basename(path))
    return read(path, name)

  monkeypatch.setattr(subject.folder.safetensors, 'read', noted)

  def moved(original, url, *args, **kwargs):
    return original(str(url).replace('gs://bucket', str(tmp_path)), *args)

  subject.load(url)
  local = copies.copy()
  copies.clear()
  with epath_testing.mock_epath(open=moved, exists=moved, isdir=moved):
    subject.load('gs://bucket/m')
  assert copies == ['0', '1']
  # The files of a local folder are read where they are.
  assert local == sorted(p.name for p in (tmp_path / 'm').glob('*.safetensors'))


def test_a_site_of_a_manifest_is_one_folder():
  assert layout.array_name('blocks.1.z') == 'activations/blocks.1.z'
  for site in ('../../etc', '/etc', 'a/b', ''):
    with pytest.raises(errors.UserError, match='is no plain file name'):
      layout.array_name(site)
