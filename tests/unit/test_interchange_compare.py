"""The comparison with other libraries, with a reference in their place."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from experiments.interchange import compare
from sae_jax import errors
from sae_jax.interchange import formats, registry
from tests.support import interchange_reference as reference


def stand_in(change=None):
  """Reads and evaluates by the reference, and saves a copy.

  Args:
    change: function from a record and its latents and reconstruction to others.
  """

  def run(config, workdir):
    text = pathlib.Path(workdir, 'records.json').read_text()
    for record in json.loads(text)['records']:
      folder, url = pathlib.Path(record['folder']), pathlib.Path(record['url'])
      x_BD = np.load(folder / 'x.npy').astype(np.float64)
      z_BN, y_BD = reference.evaluate(registry.read(url), x_BD)
      if change:
        z_BN, y_BD = change(record, z_BN, y_BD)
      np.savez(folder / 'theirs.npz', z=z_BN, y=y_BD)
      # What is written, without what is made beside it.
      names = shutil.ignore_patterns('resaved', '*.npy', '*.npz')
      shutil.copytree(folder, folder / 'resaved', ignore=names)

  return run


@pytest.fixture(name='cases', scope='module')
def cases_fixture():
  names = ['topk', 'topk_center_unit_norm', 'gated', 'relu_transcoder']
  return compare.golden_cases() + compare.own_cases(names)


def rows(cases, workdir, run, monkeypatch):
  monkeypatch.setattr(compare, 'golden_cases', lambda: cases)
  monkeypatch.setattr(compare, 'own_cases', list)
  monkeypatch.setattr(compare, '_run_libraries', run)
  config = compare.CompareConfig(openai_model='model.py')
  return compare.compare(config, str(workdir))


def worst(row):
  return max(row['latents'], row['reconstruction'], row['saved'])


def test_all_are_the_same_functions(cases, tmp_path, monkeypatch):
  compared = rows(cases, tmp_path / 'a', stand_in(), monkeypatch)
  assert max(map(worst, compared)) < compare.MOST
  assert {row['format'] for row in compared} == set(formats.WRITTEN) - {'plain'}
  # Each kind of ours is held by one at least.
  ours = {case.name for case in cases if case.name.startswith('sae_jax')}
  assert ours <= {row['case'] for row in compared}
  assert len(compare.lines(compared)) == len(formats.WRITTEN)


def test_controls_a_wrong_library_is_seen(cases, tmp_path, monkeypatch):
  some = [case for case in cases if case.name == 'sae_jax/topk']

  def change(record, z_BN, y_BD):
    if record['format'] == 'saelens':
      z_BN = np.roll(z_BN, 1, axis=1)
    return z_BN, y_BD + (record['format'] == 'sparsify') * 1e-3

  compared = rows(some, tmp_path / 'a', stand_in(change), monkeypatch)
  by_format = {row['format']: row for row in compared}
  assert by_format['saelens']['latents'] > 0.1
  assert compare.MOST < by_format['sparsify']['reconstruction'] < 1e-2
  assert worst(by_format['dictionary_learning']) < compare.MOST
  missing = compare.CompareConfig(torch_python=str(tmp_path / 'none'))
  monkeypatch.undo()
  with pytest.raises(errors.UserError, match='cannot run '):
    compare._run_libraries(missing, str(tmp_path))
