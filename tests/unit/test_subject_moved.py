"""A subject that results were made of, where it was and where it is now."""

import shutil

import jax
import numpy as np
import pytest

from sae_jax import errors, subject
from sae_jax.browser import build
from tests.support import gguf_models, hf_folder

LLAMA = 'llama 3 stretched positions'


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  """One model in each format, by its kind."""
  folder = tmp_path_factory.mktemp('models')
  record = hf_folder.golden()[LLAMA]
  gguf = gguf_models.write(folder / 'm.gguf', record)
  subject.save(subject.load(gguf), str(folder / 'saved'))
  return {
    'gguf': gguf,
    'folder': hf_folder.write(folder / 'hf', record, n_files=2),
    'saved': str(folder / 'saved'),
  }


@pytest.mark.parametrize('kind', ['gguf', 'folder', 'saved'])
def test_a_digest_needs_no_weights_in_memory(kind, places):
  loaded = subject.load(places[kind])
  assert subject.digest(places[kind]) == loaded.weights_sha256


@pytest.mark.parametrize('kind', ['gguf', 'folder'])
def test_a_model_that_was_moved_is_the_same(kind, places, tmp_path):
  was = str(tmp_path / places[kind].rpartition('/')[2])
  shutil.copytree(places[kind], was) if kind == 'folder' else shutil.copy(
    places[kind], was
  )
  before = subject.load_recorded(was, subject.digest(was))
  sha256, words = (
    before.weights_sha256,
    build.vocabulary({'subject': was, 'weights_sha256': before.weights_sha256}),
  )
  now = shutil.move(was, tmp_path / f'now{was[-5:]}')
  report = {'subject': was, 'weights_sha256': sha256}
  for read in (
    lambda: subject.load_recorded(was, sha256),
    lambda: build.vocabulary(report),
  ):
    with pytest.raises(errors.UserError, match='say with --subject where it'):
      read()
  moved = subject.load_recorded(was, sha256, str(now))
  jax.tree.map(np.testing.assert_array_equal, moved.params, before.params)
  assert build.vocabulary(report, str(now)) == words


def test_another_model_is_refused(places):
  sha256 = subject.digest(places['gguf'])
  record = {'subject': places['gguf'], 'weights_sha256': sha256}
  for read in (
    lambda: subject.load_recorded(places['gguf'], sha256, places['folder']),
    lambda: build.vocabulary(record, places['folder']),
    # As it is now, where it was.
    lambda: subject.load_recorded(places['folder'], sha256),
  ):
    with pytest.raises(
      errors.UserError, match='is not the model that this was'
    ):
      read()


def test_a_recorded_path_is_absolute(places, tmp_path, monkeypatch):
  shutil.copy(places['gguf'], tmp_path / 'm.gguf')
  monkeypatch.chdir(tmp_path)
  assert subject.recorded_name('m.gguf') == str(tmp_path / 'm.gguf')
  for name in ('smollm2-135m', 'gs://bucket/m.gguf', 'a name of my own'):
    assert subject.recorded_name(name) == name
