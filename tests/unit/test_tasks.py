"""Probe tasks: unique, balanced, of like length, split without leaks."""

import csv
import importlib.util
import io
import re
import sys

import numpy as np
import pytest
import zstandard

from sae_jax import errors
from sae_jax.probing import probes, sources, tasks
from sae_jax.probing.sources import sae_probes

_needs_package = pytest.mark.skipif(
  importlib.util.find_spec('sae_probes') is None,
  reason='package sae_probes is not installed',
)


def _write(folder, name, rows):
  text = io.StringIO(newline='')
  writer = csv.writer(text)
  writer.writerow(['prompt', 'prompt_len', 'target'])
  writer.writerows((p, len(p), target) for p, target in rows)
  data = zstandard.compress(text.getvalue().encode())
  (folder / f'{name}.csv.zst').write_bytes(data)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The data folder of a package sae_probes that must not be imported."""
  package = tmp_path / 'sae_probes'
  data = package / 'data' / 'cleaned_data'
  data.mkdir(parents=True)
  (package / '__init__.py').write_text('raise RuntimeError("imported")')
  monkeypatch.syspath_prepend(tmp_path)
  return data


def _rows(name):
  """Prompts and labels of a task of the package, as they are."""
  path = sae_probes._folder() / f'{name}.csv.zst'
  with zstandard.open(path, 'rt', encoding='utf-8', newline='') as text:
    return [(row['prompt'], row['target']) for row in csv.DictReader(text)]


def _plain_rows(n_rows, classes=('0', '1'), stem='text'):
  return [(f'{stem} {i:04d}', classes[i % len(classes)]) for i in range(n_rows)]


def _length_auc(prompts, labels):
  lengths_P1 = np.array([[len(p)] for p in prompts])
  return probes.auc(lengths_P1, np.asarray(labels))[0]


def _shared(prompts, train_idx, test_idx):
  """Prompts on both sides of a split, whatever their case and spacing."""
  keys = [' '.join(p.casefold().split()) for p in prompts]
  return {keys[i] for i in train_idx} & {keys[i] for i in test_idx}


def test_reads_labels_in_sorted_order_without_importing(folder):
  rows = [(f'nay {i}', 'False') for i in range(20)]
  rows += [(f'yea {i}', 'True') for i in range(20)]
  _write(folder, '7_truth', rows)
  (task,) = tasks.load_tasks(['7_truth'], n_prompts=30)
  assert task.name == '7_truth'
  assert task.classes == ('False', 'True')
  assert len(task.prompts) == 30 and task.labels_P.sum() == 15
  for prompt, label in zip(task.prompts, task.labels_P):
    assert prompt.startswith('yea' if label else 'nay')
  assert 'sae_probes' not in sys.modules


def test_repeats_go_before_the_split(folder):
  rows = _plain_rows(60)
  rows += [(p.upper().replace(' ', '  ') + '\n', t) for p, t in rows]
  _write(folder, '1_repeats', rows)
  (task,) = tasks.load_tasks(['1_repeats'], n_prompts=60)
  assert not _shared(task.prompts, *tasks.split(task))
  with pytest.raises(errors.UserError, match='has 60 prompts'):
    tasks.load_tasks(['1_repeats'], n_prompts=62)

  # The same split of the rows as they are in the file does leak.
  prompts, targets = zip(*rows)
  raw = tasks.Task('raw', prompts, np.array([int(t) for t in targets]))
  assert len(_shared(raw.prompts, *tasks.split(raw))) > 10


def test_a_prompt_with_two_labels_is_dropped(folder):
  rows = [*_plain_rows(20), ('Both ways', '0'), ('both  ways', '1')]
  _write(folder, '1_conflict', rows)
  (task,) = tasks.load_tasks(['1_conflict'], n_prompts=20)
  assert sorted(task.prompts) == sorted(p for p, _ in rows[:20])


def test_white_space_at_the_ends_tells_nothing(folder):
  rows = [(p + (' ' if t == '1' else ''), t) for p, t in _plain_rows(20)]
  _write(folder, '1_space', rows)
  (task,) = tasks.load_tasks(['1_space'], n_prompts=20)
  assert all(p == p.strip() for p in task.prompts)


def test_length_tells_nothing(folder):
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 2, 3000)
  lengths = np.clip(rng.normal(40 + 20 * labels, 15).astype(int), 6, 100)
  rows = [
    (f'{i:05d}'.ljust(length, 'x'), str(label))
    for i, (length, label) in enumerate(zip(lengths, labels))
  ]
  _write(folder, '1_lengths', rows)
  (task,) = tasks.load_tasks(['1_lengths'], n_prompts=800)
  assert abs(_length_auc(task.prompts, task.labels_P) - 0.5) < 0.02
  assert max(map(len, task.prompts)) <= 100

  # Balancing the classes alone leaves the artefact.
  drawn = np.concatenate(
    [rng.choice(np.flatnonzero(labels == c), 400, False) for c in (0, 1)]
  )
  assert _length_auc([rows[i][0] for i in drawn], labels[drawn]) > 0.75


def test_long_prompts_are_left_out(folder):
  rows = _plain_rows(20) + _plain_rows(20, stem='y' * 50)
  _write(folder, '1_long', rows)
  (task,) = tasks.load_tasks(['1_long'], n_prompts=20, max_chars=30)
  assert max(map(len, task.prompts)) <= 30
  with pytest.raises(
    errors.UserError, match=r'20 prompts of at most 30 .* is 22'
  ):
    tasks.load_tasks(['1_long'], n_prompts=22, max_chars=30)


def test_the_seed_and_the_name_decide_and_nothing_else(folder):
  for name in ('1_a', '2_b'):
    _write(folder, name, _plain_rows(400))
  (alone,) = tasks.load_tasks(['2_b'], n_prompts=100)
  _, beside = tasks.load_tasks(['1_a', '2_b'], n_prompts=100)
  (other,) = tasks.load_tasks(['2_b'], n_prompts=100, seed=1)
  assert alone.prompts == beside.prompts != other.prompts
  np.testing.assert_array_equal(alone.labels_P, beside.labels_P)


def test_all_takes_the_sound_binary_tasks_in_order(folder):
  demo = tasks.DEMO_TASKS[0]
  flawed = next(iter(tasks.FLAWED_TASKS))
  for name in ('10_ten', '9_nine', demo, flawed):
    _write(folder, name, _plain_rows(40))
  _write(folder, '3_three', _plain_rows(60, classes='abc'))
  _write(folder, '4_small', _plain_rows(10))
  loaded = tasks.load_tasks(n_tasks=0, n_prompts=40)
  assert [t.name for t in loaded] == [demo, '9_nine', '10_ten']
  assert [t.name for t in tasks.load_tasks(None, 2, 40)] == [demo, '9_nine']
  assert tasks.load_tasks([flawed], n_prompts=40)[0].name == flawed
  with pytest.raises(errors.UserError, match='only 3 of 4 probe tasks have 40'):
    tasks.load_tasks(n_tasks=4, n_prompts=40)
  with pytest.raises(errors.UserError, match='only 0 of'):
    tasks.load_tasks(n_tasks=0, n_prompts=400)


def test_split_is_stratified_disjoint_and_seeded():
  labels_P = np.repeat([0, 1], [90, 30])
  prompts = tuple(map(str, range(120)))
  task = tasks.Task('t', prompts, labels_P)
  train, test = tasks.split(task, seed=3, test_fraction=0.3)
  np.testing.assert_array_equal(
    np.sort(np.concatenate([train, test])), np.arange(120)
  )
  assert np.bincount(labels_P[test]).tolist() == [27, 9]
  again, _ = tasks.split(task, seed=3, test_fraction=0.3)
  other, _ = tasks.split(task, seed=4, test_fraction=0.3)
  np.testing.assert_array_equal(train, again)
  assert not np.array_equal(train, other)


@pytest.mark.parametrize('fraction', [0.0, 0.01, 1.0, 1.5])
def test_split_refuses_an_empty_side(fraction):
  task = tasks.Task('t', tuple('abcdefgh'), np.arange(8) % 2)
  with pytest.raises(errors.UserError, match='4 prompts with label 0'):
    tasks.split(task, test_fraction=fraction)


def test_errors_name_the_numbers_and_the_remedy(folder, monkeypatch):
  _write(folder, '10_nyc_borough', _plain_rows(60, classes='abc'))
  _write(folder, '5_age', _plain_rows(60))
  with pytest.raises(
    errors.UserError, match=r"'nyc_boro' .* did you mean 10_nyc_bor"
  ):
    tasks.load_tasks(['nyc_boro'])
  with pytest.raises(
    errors.UserError, match='did you mean 5_age, 10_nyc_borough'
  ):
    tasks.load_tasks(['??'])
  with pytest.raises(
    errors.UserError, match='10_nyc_borough is not a binary task'
  ):
    tasks.load_tasks(['10_nyc_borough'])
  with pytest.raises(
    errors.UserError, match=r'11 prompts of a task must be .* use 12'
  ):
    tasks.load_tasks(['5_age'], n_prompts=11)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(
    errors.UserError, match='pip install --no-deps sae-probes'
  ):
    tasks.load_tasks(['5_age'])


def test_a_package_without_its_data_counts_as_missing(folder):
  folder.rmdir()
  with pytest.raises(errors.UserError, match='pip install'):
    tasks.load_tasks(['5_age'])


@_needs_package
def test_the_demo_tasks_of_the_package():
  loaded = tasks.load_tasks()
  assert tuple(t.name for t in loaded) == tasks.DEMO_TASKS
  for task in loaded:
    assert len(set(task.prompts)) == len(task.prompts) == 400
    assert task.labels_P.sum() == 200
    assert abs(_length_auc(task.prompts, task.labels_P) - 0.5) < 0.03
    assert not _shared(task.prompts, *tasks.split(task))
  assert 'sae_probes' not in sys.modules


def _told_by_a_word(labels):
  """How well one word, or the last one, tells labels of other prompts: AUC.

  The word is the one that does so best on every second prompt, the last words
  are scored by how often each had the label there.
  """
  pairs = tasks._pairs(labels, np.random.default_rng(0))[:400]
  words = [
    [re.findall(r'\w+|[^\w\s]', prompt.casefold()) for prompt in pair]
    for pair in pairs
  ]
  half = len(words) // 2
  any_word, last_word = ({}, {})
  for pair in words[:half]:
    for label, prompt in enumerate(pair):
      for counts, members in (
        (any_word, set(prompt)),
        (last_word, prompt[-1:]),
      ):
        for word in members:
          counts.setdefault(word, [1, 1])[label] += 1
  best = max(any_word, key=lambda word: abs(np.diff(any_word[word])[0]))
  rest = [prompt for pair in words[half:] for prompt in pair]
  scores = [
    [float(best in prompt) for prompt in rest],
    [
      np.divide(*last_word.get(prompt[-1] if prompt else '', [1, 1]))
      for prompt in rest
    ],
  ]
  aucs = [
    probes.auc(np.array(s)[:, None], np.arange(len(rest)) % 2)[0]
    for s in scores
  ]
  return max(max(auc, 1 - auc) for auc in aucs)


@_needs_package
def test_flawed_tasks_are_in_the_package_and_flawed():
  assert _rows('112_amzn_rev') == _rows('111_yelp_data')
  assert _rows('112_amzn_rev') != _rows('113_movie_sent')
  prompts = [prompt for prompt, _ in _rows('69_blood-pressure')]
  assert len(prompts) - len(set(prompts)) == 793
  for name, flaw in tasks.FLAWED_TASKS.items():
    classes, labels = sae_probes.read(name)
    if name == '112_amzn_rev':
      continue
    assert len(classes) == 2, name
    if 'length' in flaw.reason:
      tells = _length_auc(labels, list(labels.values()))
      assert max(tells, 1 - tells) > 0.99, name
    elif 'full stops' in flaw.reason:
      stops_P1 = np.array([['.' in prompt] for prompt in labels])
      tells = probes.auc(stops_P1, list(labels.values()))[0]
      assert max(tells, 1 - tells) > 0.8, name
    elif 'word' in flaw.reason or 'mark' in flaw.reason:
      assert _told_by_a_word(labels) > 0.85, name
  # Control: in a task without a flaw no word does.
  assert _told_by_a_word(sae_probes.read('113_movie_sent')[1]) < 0.65


def test_a_source_is_a_file(folder, monkeypatch):
  _write(folder, '2_b', _plain_rows(40))

  class Other:
    ORIGIN, LICENCE = 'made here', 'CC0'

    @staticmethod
    def names():
      return ['of_ours']

    @staticmethod
    def read(name):
      labels = {f'{name} {i:02d}': i % 2 for i in range(40)}
      return ('no', 'yes'), labels

  monkeypatch.setattr(sources, 'NAMES', ('sae_probes', 'other'))
  monkeypatch.setitem(sys.modules, f'{sources.__name__}.other', Other)
  loaded = tasks.load_tasks(n_tasks=0, n_prompts=40)
  assert [(t.name, t.source) for t in loaded] == [
    ('2_b', 'sae_probes'),
    ('of_ours', 'other'),
  ]
  (named,) = tasks.load_tasks(['of_ours'], n_prompts=20)
  assert named.classes == ('no', 'yes') and len(named.prompts) == 20
  assert sources.records()['other'] == {'origin': 'made here', 'licence': 'CC0'}
  with pytest.raises(errors.UserError, match=r"'ofours' .* of_ours"):
    tasks.load_tasks(['ofours'])


def test_of_all_tasks_the_small_ones_have_what_they_have(folder, caplog):
  for name, n_rows in (('1_a', 300), ('2_b', 120), ('3_c', 90)):
    _write(folder, name, _plain_rows(n_rows))
  loaded = tasks.load_tasks(n_tasks=0, n_prompts=200)
  assert [(t.name, len(t.prompts)) for t in loaded] == [
    ('1_a', 200),
    ('2_b', 120),
  ]
  assert '1 binary tasks have fewer than 100 prompts' in caplog.text
  # A number of tasks is of tasks that are as large as was asked for.
  assert [t.name for t in tasks.load_tasks(n_tasks=1, n_prompts=200)] == ['1_a']
  with pytest.raises(errors.UserError, match='only 1 of 2'):
    tasks.load_tasks(n_tasks=2, n_prompts=200)
