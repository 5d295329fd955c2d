"""The index on disk says what the arrays say."""

import collections
import json

import numpy as np
import pytest

from sae_jax import errors
from sae_jax import features as features_lib
from sae_jax.browser import entries, index
from sae_jax.features import writer
from tests.support import synthetic_features


@pytest.fixture(scope='module')
def made():
  return synthetic_features.make(
    n_latents=30, n_examples=4, window=24, n_tokens=4000
  )


@pytest.fixture(scope='module')
def folder(made, tmp_path_factory):
  out = tmp_path_factory.mktemp('browser')
  config = index.BrowseConfig(features_per_shard=7, activation_digits=9)
  synthetic_features.build(*made, out, config)
  return out


def read(folder, name):
  def refuse(constant):
    raise ValueError(f'{name} holds {constant}, which is not JSON')

  text = (folder / 'data' / name).read_text()
  return json.loads(text, parse_constant=refuse)


def read_shards(folder):
  names = sorted(p.name for p in (folder / 'data' / 'features').iterdir())
  return [read(folder, f'features/{name}') for name in names]


def mismatches(features, folder):
  """Names of the arrays that the files do not give back."""
  columns = read(folder, 'columns.json')
  rebuilt = {name: np.full_like(a, -1) for name, a in features.items()}
  for name in ('count', 'density', 'max', 'mean', 'std', 'skew'):
    rebuilt[name] = np.array(columns[name], features[name].dtype)
  rebuilt['latent_ids'] = np.array(columns['latent'])
  rebuilt['hist_edges'] = np.float32(read(folder, 'meta.json')['hist_edges'])
  for kind in ('top', 'random'):
    rebuilt[f'{kind}_acts'][:] = 0
  entries = [entry for shard in read_shards(folder) for entry in shard]
  for row, entry in enumerate(entries):
    assert entry['latent'] == features['latent_ids'][row]
    rebuilt['hist_counts'][row] = entry['histogram']
    for kind in ('top', 'random'):
      for i, example in enumerate(entry[kind]):
        width = len(example['tokens'])
        rebuilt[f'{kind}_tokens'][row, i, :width] = example['tokens']
        rebuilt[f'{kind}_acts'][row, i, example['fired']] = example['acts']
        rebuilt[f'{kind}_peak'][row, i] = example['peak']
        rebuilt[f'{kind}_document'][row, i] = example['document']
    for way in ('up', 'down'):
      votes = entry[f'votes_{way}']
      rebuilt[f'vote_{way}_ids'][row] = votes['tokens']
      rebuilt[f'vote_{way}_logits'][row] = votes['logits']
    measured = entry['effect']
    if measured is None:
      for name in ('kl', 'ce'):
        rebuilt[f'effect_{name}'][row] = np.nan
      for way in ('up', 'down'):
        rebuilt[f'effect_{way}_changes'][row] = 0
    else:
      for name in ('kl', 'ce'):
        rebuilt[f'effect_{name}'][row] = measured[name]
      for way in ('up', 'down'):
        rebuilt[f'effect_{way}_ids'][row] = measured[way]['tokens']
        rebuilt[f'effect_{way}_changes'][row] = measured[way]['changes']
    rebuilt['neighbour_ids'][row] = entry['neighbours']['latents']
    rebuilt['neighbour_cosines'][row] = entry['neighbours']['cosines']
  return [
    name
    for name in features
    if not np.array_equal(
      features[name], rebuilt[name], equal_nan=features[name].dtype.kind == 'f'
    )
  ]


def test_files_give_the_arrays_back(made, folder):
  assert mismatches(made[0], folder) == []
  assert [len(shard) for shard in read_shards(folder)] == [7, 7, 7, 7, 2]


@pytest.mark.parametrize(
  'name',
  [
    'density',
    'top_acts',
    'random_peak',
    'vote_up_logits',
    'count',
    'effect_down_changes',
  ],
)
def test_comparison_sees_one_changed_number(made, folder, name):
  features = {k: v.copy() for k, v in made[0].items()}
  alive = np.flatnonzero(
    (features['count'] > 0) & np.isfinite(features['effect_kl'])
  )[3]
  features[name][alive].flat[0] += 1 if name == 'count' else 0.001
  if name == 'random_peak':
    features[name][alive, 0] += 1
  elif np.ndim(features[name]) == 1:
    features[name][alive] *= 1.001 if name == 'density' else 2
  assert mismatches(features, folder) == [name]


def test_activations_keep_the_digits_asked_for(made, tmp_path):
  features, report, vocabulary = made
  synthetic_features.build(
    features,
    report,
    vocabulary,
    tmp_path,
    index.BrowseConfig(activation_digits=3),
  )
  row = int(np.flatnonzero(features['count'])[0])
  example = read_shards(tmp_path)[0][row]['top'][0]
  whole = features['top_acts'][row, 0][example['fired']]
  np.testing.assert_allclose(example['acts'], whole, rtol=5.1e-3)
  assert not np.array_equal(np.float32(example['acts']), whole)
  assert all(
    len(str(v).strip('0').replace('.', '')) <= 3 for v in example['acts']
  )


def test_top_tokens_are_those_at_the_peaks_most_frequent_first(made, folder):
  features, _, _ = made
  columns = read(folder, 'columns.json')
  for row, top in enumerate(columns['top']):
    peaks = [
      int(tokens[peak])
      for tokens, peak in zip(
        features['top_tokens'][row], features['top_peak'][row]
      )
      if peak >= 0
    ]
    times = collections.Counter(peaks)
    assert sorted(top) == sorted(times)
    assert [times[t] for t in top] == sorted(times.values(), reverse=True)
    assert columns['votes'][row] == features['vote_up_ids'][row, :5].tolist()


def test_previews_hold_the_peak_in_full_strength(made, folder):
  features, _, _ = made
  previews = read(folder, 'previews.json')
  for row in np.flatnonzero(features['count']):
    best = features['top_tokens'][row, 0][features['top_peak'][row, 0]]
    tokens, percents = previews['tokens'][row], previews['percents'][row]
    assert len(tokens) == len(percents) <= 12
    assert tokens[percents.index(100)] == best


def test_texts_are_written_once(made, folder):
  _, _, vocabulary = made
  assert read(folder, 'vocabulary.json') == vocabulary
  assert '\ud83d' in vocabulary
  for path in (folder / 'data').rglob('*.json'):
    holds = 'committee' in path.read_text()
    assert holds == (path.name == 'vocabulary.json'), path.name


def test_silent_latents_have_votes_but_no_contexts(made, folder):
  features, _, _ = made
  silent = np.flatnonzero(features['count'] == 0)
  assert len(silent)
  entries = [entry for shard in read_shards(folder) for entry in shard]
  previews = read(folder, 'previews.json')
  for row in silent:
    assert entries[row]['top'] == entries[row]['random'] == []
    assert len(entries[row]['votes_up']['tokens']) == 10
    assert previews['tokens'][row] == []
  meta = read(folder, 'meta.json')
  assert meta['n_alive'] == 30 - len(silent)
  assert meta['n_features'] == 30


def test_padding_on_the_left_moves_the_peak(made, tmp_path):
  features, report, vocabulary = made
  plain = {k: v.copy() for k, v in features.items()}
  row = int(np.flatnonzero(features['count'])[0])
  plain['top_tokens'][row, 0, 20:] = -1
  plain['top_acts'][row, 0, 20:] = 0
  plain['top_peak'][row, 0] = 5
  plain['top_acts'][row, 0, 5] = 9
  moved = {k: v.copy() for k, v in plain.items()}
  for name in ('top_tokens', 'top_acts'):
    moved[name][row, 0] = np.roll(plain[name][row, 0], 4)
  moved['top_peak'][row, 0] = 9
  synthetic_features.build(plain, report, vocabulary, tmp_path / 'plain')
  synthetic_features.build(moved, report, vocabulary, tmp_path / 'moved')
  assert read_shards(tmp_path / 'plain') == read_shards(tmp_path / 'moved')


def test_what_is_absent_or_not_finite_is_left_out_or_null(made, tmp_path):
  features, report, vocabulary = made
  features = {k: v.copy() for k, v in features.items()}
  features['skew'][2] = np.nan
  features['max'][3] = np.inf
  features['neighbour_ids'][1, 3:] = -1
  features['vote_up_ids'][1, 4:] = -1
  report = {**report, 'kl': float('nan'), 'delta_ce': np.float32(0.5)}
  report['curve'] = np.arange(3)
  synthetic_features.build(features, report, vocabulary, tmp_path)
  columns = read(tmp_path, 'columns.json')
  assert columns['skew'][2] is None
  assert columns['max'][3] is None
  entry = read_shards(tmp_path)[0][1]
  assert len(entry['neighbours']['latents']) == 3
  assert len(entry['neighbours']['cosines']) == 3
  assert len(entry['votes_up']['logits']) == 4
  written = read(tmp_path, 'meta.json')['report']
  assert written['kl'] is None
  assert written['delta_ce'] == 0.5
  assert written['curve'] == [0, 1, 2]


def contents(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*.*')
  }


def test_a_table_that_is_open_and_its_folder_give_the_same_bytes(
  made, tmp_path
):
  features, report, vocabulary = made
  writer.write(tmp_path / 'features', features)
  opened = features_lib.open(tmp_path / 'features')
  for name, table in (('a', tmp_path / 'features'), ('b', opened)):
    index.build_index(table, report, vocabulary, tmp_path / name)
  assert len(contents(tmp_path / 'a')) > 10
  assert contents(tmp_path / 'a') == contents(tmp_path / 'b')


def test_blocks_do_not_matter(made, tmp_path, monkeypatch):
  config = index.BrowseConfig(features_per_shard=7)
  synthetic_features.build(*made, tmp_path / 'whole', config)
  monkeypatch.setattr(index, '_BLOCK', 10)
  synthetic_features.build(*made, tmp_path / 'blocks', config)
  assert contents(tmp_path / 'blocks') == contents(tmp_path / 'whole')
  # Control: the data files' size does.
  config = index.BrowseConfig(features_per_shard=8)
  synthetic_features.build(*made, tmp_path / 'other', config)
  assert contents(tmp_path / 'other') != contents(tmp_path / 'whole')


def test_build_names_the_content(made, tmp_path):
  features, report, vocabulary = made
  builds = []
  alive = np.flatnonzero(features['count'])[0]
  for change in (0, 0, 1):
    features['top_document'][alive, 0] += change
    synthetic_features.build(features, report, vocabulary, tmp_path)
    builds.append(read(tmp_path, 'meta.json')['build'])
  features['top_document'][alive, 0] -= 1
  assert builds[0] == builds[1] != builds[2]


def test_interrupted_build_leaves_no_index(made, tmp_path, monkeypatch):
  synthetic_features.build(
    *made, tmp_path, index.BrowseConfig(features_per_shard=5)
  )
  assert len(read_shards(tmp_path)) == 6

  def fail(table, digits):
    raise OSError('disk full')

  with monkeypatch.context() as patch:
    patch.setattr(entries, '_entries', fail)
    with pytest.raises(OSError, match='disk full'):
      synthetic_features.build(*made, tmp_path)
  assert not (tmp_path / 'data' / 'meta.json').exists()
  synthetic_features.build(*made, tmp_path)
  assert len(read_shards(tmp_path)) == 1


def test_errors_name_the_numbers(made, tmp_path):
  features, report, vocabulary = made

  def message(features=features, report=report, vocabulary=vocabulary, **opts):
    with pytest.raises(errors.UserError) as error:
      synthetic_features.build(
        features,
        report,
        vocabulary,
        tmp_path / 'out',
        index.BrowseConfig(**opts),
      )
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'out' / 'finished.json').exists()
    return str(error.value)

  assert 'the vocabulary ends at 99' in message(vocabulary=vocabulary[:100])
  assert 'features_per_shard 0 must be 1 or more' in message(
    features_per_shard=0
  )
  assert 'report.x is a set' in message(report={'x': {1}})
  twice = features | {'latent_ids': features['latent_ids'] // 2}
  assert 'latent_ids holds latent 0 in row 1: run' in message(twice)


@pytest.mark.parametrize(
  ('name', 'said'),
  [
    ('none', 'none is no finished feature table, it has no manifest'),
    ('features.npz', r'features\.npz is a table of an earlier sae_jax: run'),
  ],
)
def test_a_table_that_is_not_there_leaves_an_older_page(
  made, tmp_path, name, said
):
  _, report, vocabulary = made
  synthetic_features.build(*made, tmp_path / 'page')
  before = contents(tmp_path / 'page')
  if name == 'features.npz':
    (tmp_path / name).write_bytes(b'PK')
  with pytest.raises(errors.UserError, match=said):
    index.build_index(tmp_path / name, report, vocabulary, tmp_path / 'page')
  assert contents(tmp_path / 'page') == before


def test_examples_may_be_absent(made, tmp_path):
  features, report, vocabulary = made
  absent = ('top_', 'random_', 'vote_', 'neighbour')
  none = {
    name: array[:, :0] if name.startswith(absent) else array
    for name, array in features.items()
  }
  synthetic_features.build(none, report, vocabulary, tmp_path)
  (shard,) = read_shards(tmp_path)
  assert all(e['top'] == e['random'] == [] for e in shard)
  assert all(e['votes_up'] == {'tokens': [], 'logits': []} for e in shard)
  assert read(tmp_path, 'previews.json')['tokens'] == [[]] * 30


def test_page_asks_for_nothing_from_elsewhere(folder):
  page = {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}
  assert {'index.html', 'app.js', 'style.css'} <= set(page)
  assert "default-src 'none'" in page['index.html']
  for name, text in page.items():
    rest = text.replace('http://www.w3.org/2000/svg', '').replace(
      'http://localhost:8000', ''
    )
    assert '://' not in rest, name
    for word in ('innerHTML', 'outerHTML', 'insertAdjacentHTML', 'eval('):
      assert word not in text, f'{name} uses {word}'
