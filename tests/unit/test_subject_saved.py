"""What a saved subject's record says, damaged in each way."""

import dataclasses
import json
import shutil

import pytest

from sae_jax import errors, subject
from tests.support import toy


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """The folder of a saved subject."""
  url = str(tmp_path_factory.mktemp('saved') / 'm')
  made = toy.subject()
  scaling = subject.transformer.RopeScaling('linear', 2.0)
  config = dataclasses.replace(
    made.config, rope_scaling=scaling, windows=(3, 0, 3)
  )
  subject.save(dataclasses.replace(made, config=config), url)
  assert subject.load(url).config == config
  return url


@pytest.mark.parametrize(
  'field, value, message',
  [
    ('windows', [3, 3, 3], 'is not as it was written, its sha256 is another'),
    ('embed_scale', 2.0, 'is not as it was written, its sha256 is another'),
    ('d_head', 4, 'is not as it was written, its sha256 is another'),
    ('n_kv_heads', 0, 'n_kv_heads 0 must be from 1'),
    ('n_layers', 'x', "config: n_layers is 'x', not of the type int"),
    ('rope_scaling', {'kind': 'linear', 'odd': 1}, 'rope_scaling is'),
    ('odd', 1, 'config has no field odd'),
  ],
)
def test_a_record_that_was_changed_is_refused(saved, field, value, message):
  path = f'{saved}/subject.json'
  with open(path) as file:
    text = file.read()
  record = json.loads(text)
  record['config'][field] = value
  with open(path, 'w') as file:
    json.dump(record, file)
  try:
    with pytest.raises(errors.UserError) as error:
      subject.load(saved)
  finally:
    with open(path, 'w') as file:
      file.write(text)
  assert message in str(error.value)
  assert str(error.value).startswith(path) or field == 'n_kv_heads'


def test_parameters_that_are_not_there_are_refused(saved, tmp_path):
  shutil.copytree(saved, tmp_path / 'm')
  (tmp_path / 'm/params/arrays/manifest.ocdbt').unlink()
  with pytest.raises(errors.UserError) as error:
    subject.load(str(tmp_path / 'm'))
  assert str(error.value).startswith(f'{tmp_path}/m/params cannot be read (')
  assert str(error.value).endswith(': save the subject again')
