"""A folder of somebody else, or of other inputs, is left as it is."""

import dataclasses
import json
import types

import pytest

from sae_jax import errors
from sae_jax.browser import build
from sae_jax.features import results
from sae_jax.harvesting import harvest
from sae_jax.storage import claim, workdir
from sae_jax.training import resume, train
from tests.support import planted, runs, toy

FIRST = {'step': 40, 'config': {'seed': 0, 'rows': [1, 2]}}
SECOND = {'step': 20, 'config': {'seed': 1, 'rows': [1, 2]}}


def begin(folder, made_from):
  with workdir.hold(str(folder), 'sae-probe', made_from):
    workdir.sign(str(folder), 'sae-probe', made_from)


def test_results_of_other_inputs_are_refused(tmp_path):
  folder = tmp_path / 'deep' / 'probe'
  begin(folder, FIRST)
  begin(folder, FIRST)
  with pytest.raises(errors.UserError) as raised:
    begin(folder, SECOND)
  assert str(raised.value) == (
    f'{folder} holds results of other inputs (config.seed: 0 -> 1; step: 40 '
    '-> 20): use another folder, or delete this one to make them anew'
  )
  # Another stage is somebody else too.
  with (
    pytest.raises(errors.UserError, match=r'made_from\.json and is not of sae'),
    workdir.hold(str(folder), 'sae-browse', FIRST),
  ):
    pass
  assert json.loads((folder / workdir.MADE_FROM).read_text()) == {
    'stage': 'sae-probe',
    'made_from': FIRST,
  }


def test_of_two_on_one_bucket_only_one_can_sign(tmp_path):
  folder = str(tmp_path)
  # As where no folder can be claimed: both find it empty.
  with workdir.hold(folder, 'sae-probe', SECOND):
    workdir.sign(folder, 'sae-probe', FIRST)
    workdir.sign(folder, 'sae-probe', FIRST)
    with pytest.raises(errors.UserError, match='step: 40 -> 20'):
      workdir.sign(folder, 'sae-probe', SECOND)


@pytest.mark.parametrize(
  ('files', 'own'),
  [
    ({}, True),
    ({'.DS_Store': ''}, True),
    ({'.plan.json.12.partial': ''}, True),
    ({'plan.json.__lock': ''}, True),
    ({'plan.json': '{"rows": 1}', 'notes.txt': ''}, True),
    ({'plan.json': '{"other": 1}'}, False),
    ({'plan.json': '[' * 100_000}, False),
    ({'plan.json': '\xff'}, False),
    ({'notes.txt': ''}, False),
  ],
)
def test_a_folder_is_told_by_its_marks(files, own, tmp_path):
  for name, text in files.items():
    (tmp_path / name).write_text(text, encoding='latin-1')
  if own:
    workdir.check_own(tmp_path, 'sae-x', {'plan.json': ('rows',)})
    return
  with pytest.raises(errors.UserError, match='and is not of sae-x'):
    workdir.check_own(tmp_path, 'sae-x', {'plan.json': ('rows',)})


def test_a_file_is_no_folder(tmp_path):
  (tmp_path / 'a').write_text('')
  with pytest.raises(errors.UserError, match='is a file: give a folder'):
    workdir.check_own(tmp_path / 'a', 'sae-x', {})


THEIRS = {
  'index.html': '<h1>my own page</h1>',
  'style.css': 'body { color: red }',
  'config.json': '{"model_type": "llama"}',
  'data/features/by_hand.json': '{}',
}


def harvests(tmp_path, texts, folder):
  harvest.harvest(toy.config(texts), folder, toy.subject())


def trains(tmp_path, texts, folder):
  planted.write_store(str(tmp_path / 'store'))
  train.train(planted.train_config(), str(tmp_path / 'store'), folder)


def browses(tmp_path, texts, folder):
  (tmp_path / 'features').mkdir()
  (tmp_path / 'features' / 'manifest.json').write_text('{}')
  results.write(tmp_path, {}, {'subject': 'a', 'n_latents': 1})
  build.browse(build.index.BrowseConfig(), str(tmp_path), folder)


ONE_USER = {'sae-train': trains, 'sae-browse': browses}
STAGES = ONE_USER | {'sae-harvest': harvests}


@pytest.mark.parametrize('command', ONE_USER)
def test_of_two_users_the_second_is_refused(command, texts, tmp_path):
  folder = str(tmp_path / 'shared')
  # A lock is of an open file: this process stands for another.
  with (
    claim.claim(folder),
    pytest.raises(errors.UserError, match=r'shared is in use by another proc'),
  ):
    ONE_USER[command](tmp_path, texts, folder)
  assert not list((tmp_path / 'shared').iterdir())


@pytest.mark.parametrize('command', STAGES)
def test_a_folder_of_somebody_else_stays_as_it_is(command, texts, tmp_path):
  folder = tmp_path / 'theirs'
  for name, text in THEIRS.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
  with pytest.raises(errors.UserError) as raised:
    STAGES[command](tmp_path, texts, str(folder))
  assert str(raised.value).startswith(
    f'{folder} holds config.json, data, index.html, ... and is not of {command}'
  )
  assert {
    str(path.relative_to(folder)): path.read_text()
    for path in folder.rglob('*')
    if path.is_file()
  } == THEIRS


def test_runs_of_other_settings_do_not_mix_in_a_bucket(tmp_path, monkeypatch):
  """Neither has a checkpoint yet that would tell them apart."""
  store, folder = str(tmp_path / 'store'), str(tmp_path / 'run')
  planted.write_store(store)
  first, other = (
    planted.train_config(steps=4, checkpoint_every=0, seed=seed)
    for seed in (0, 1)
  )
  # On a disk, where the claim keeps users apart, it starts over.
  runs.break_off(2, {folder: other}, store)
  # Stands for a bucket in this place alone.
  bucket = types.SimpleNamespace(is_remote=lambda url: True)
  monkeypatch.setattr(resume, 'url_lib', bucket)
  runs.break_off(2, {folder: first}, store)
  with pytest.raises(errors.UserError, match=r'other inputs \(seed: 0 -> 1\)'):
    train.train(other, store, folder)
  longer = dataclasses.replace(first, steps=5)
  assert int(train.train(longer, store, folder).step) == 5
