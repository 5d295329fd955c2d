"""Neuronpedia's import bundle, read back as its import does."""

import gzip
import json

import numpy as np
import pytest

from sae_jax import errors
from sae_jax import subject as subject_lib
from sae_jax.dashboards import bundle, neuronpedia
from sae_jax.dashboards.config import DashboardConfig
from sae_jax.explaining import interchange
from sae_jax.features import explanations
from sae_jax.subject.formats import tokenizer as tokenizer_lib
from tests.support import binaries, synthetic_features

LATENTS = 14
CONFIG = DashboardConfig(
  neuronpedia_model='gpt2-small', neuronpedia_source='5-res__more'
)
EXPLAINED = {
  3: {'score': None, 'explanation': 'names of rivers'},
  12: {
    'score': {'balanced_accuracy': [0.875, 0.8, 0.9]},
    'explanation': '"quoted"\nä',
  },
  13: {'score': None, 'explanation': None},
}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """Finished results with explanations, their table and the vocabulary."""
  workdir = str(tmp_path_factory.mktemp('made') / 'probe')
  table, report, words = synthetic_features.make(LATENTS, 6, 10, 3000, 1)
  made_from = {'sae_fingerprint': 'f' * 64}
  report['made_from'] = made_from
  synthetic_features.write_results(workdir, made_from, report, table)
  lines = [
    {'latent': latent, 'model': 'm', **line}
    for latent, line in EXPLAINED.items()
  ]
  explanations.write(workdir, lines, made_from)
  words[4] = b'\xe2\x82'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(subject_lib, 'load_recorded_tokenizer', lambda *a: None)
    patch.setattr(tokenizer_lib, 'token_texts', lambda _: words)
    # Several files, and several blocks of each.
    patch.setattr(bundle, '_BATCH', 5)
    patch.setattr(bundle, '_BLOCK', 2)
    yield workdir, table, words


@pytest.fixture(scope='module')
def written(made, tmp_path_factory):
  """The folder of a bundle."""
  out = tmp_path_factory.mktemp('out')
  said = bundle.write(CONFIG, made[0], str(out))
  assert (said.latents, said.explanations) == (LATENTS, 2)
  folder = out / 'gpt2-small' / '5-res__more'
  assert said.folder == str(folder)
  return folder


def rows_of(folder, part):
  """The rows of a part, by latent; columns are those of a file's first row."""
  by_latent = {}
  for number in range(-(-LATENTS // 5)):
    path = folder / part / f'batch-{number}.jsonl.gz'
    if not path.exists():
      continue
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    rows = [json.loads(line) for line in lines]
    columns = rows[0].keys()
    for row in rows:
      assert row.keys() == columns
      assert (row['modelId'], row['layer']) == ('gpt2-small', '5-res__more')
      assert int(row['index']) // 5 == number
      by_latent.setdefault(int(row['index']), []).append(row)
  return by_latent


def text(words, ids):
  """What tokens look like there."""
  return ['�' if words[i] == b'\xe2\x82' else words[i] for i in ids]


def wrong(folder, table, words):
  """The names of what is not as in a feature table."""
  found = set()

  def check(name, got, want, rtol=1e-5):
    got, want = list(got), list(want)
    if len(got) != len(want) or not np.allclose(got, want, rtol, 0):
      found.add(name)

  features, activations = (
    rows_of(folder, part) for part in ('features', 'activations')
  )
  edges = table['hist_edges'].astype(np.float64)
  for latent in range(LATENTS):
    (row,) = features[latent]
    own = {n: of[latent] for n, of in table.items() if n != 'hist_edges'}
    check('maxActApprox', [row['maxActApprox']], [own['max']])
    check('frac_nonzero', [row['frac_nonzero']], [own['density']])
    for theirs, way in (('pos', 'up'), ('neg', 'down')):
      check(
        f'{theirs}_values', row[f'{theirs}_values'], own[f'vote_{way}_logits']
      )
      if row[f'{theirs}_str'] != text(words, own[f'vote_{way}_ids']):
        found.add(f'{theirs}_str')
    near = [latent, *own['neighbour_ids']]
    check('topkCosSimIndices', row['topkCosSimIndices'], near)
    check(
      'topkCosSimValues',
      row['topkCosSimValues'],
      [1, *own['neighbour_cosines']],
    )
    bars = dict(
      zip(row['freq_hist_data_bar_values'], row['freq_hist_data_bar_heights'])
    )
    places = np.searchsorted(edges, list(bars)) - 1
    counts = np.zeros(len(edges) - 1)
    counts[places] = list(bars.values())
    check('freq_hist', counts, own['hist_counts'])
    examples = [
      (kind, *(own[f'{kind}_{n}'][m] for n in ('tokens', 'acts', 'peak')))
      for kind in ('top', 'random')
      for m in np.flatnonzero(own[f'{kind}_peak'] >= 0)
    ]
    rows = activations.get(latent, [])
    if len(rows) != len(examples):
      found.add('activations')
    for row, (kind, tokens, acts, peak) in zip(rows, examples):
      inside = tokens >= 0
      if row['tokens'] != text(words, tokens[inside]):
        found.add('tokens')
      check('values', row['values'], acts[inside])
      highest = row['values'][row['maxValueTokenIndex']]
      check('maxValue', [row['maxValue'], highest], [acts.max()] * 2)
      at = row['values'][row['qualifyingTokenIndex']]
      check('qualifyingTokenIndex', [at], [acts[peak]])
      low, high = row['binMin'], row['binMax']
      if kind == 'top':
        check('bins', [low, row['binContains'], high], [-1, -1, own['max']])
        continue
      # Of the whole bins that the interval has.
      has = (edges[:-1] > low * (1 - 1e-5)) & (edges[:-1] < high * (1 - 1e-5))
      share = own['density'] * own['hist_counts'][has].sum() / own['count']
      check('binContains', [row['binContains']], [share])
      if not low * (1 - 1e-5) <= at <= high * (1 + 1e-5):
        found.add('bins')
      # Fifths of the largest, to half a bin of the histogram.
      fifths = own['max'] * np.arange(6) / 5
      for end in (low, high):
        if abs(fifths - end).min() > 0.15 * end:
          found.add('bins')
  return found


def test_a_bundle_has_what_the_table_has(made, written):
  _, table, words = made
  assert wrong(written, table, words) == set()
  # Of some latents there is nothing to show.
  dead = set(np.flatnonzero(table['count'] == 0).tolist())
  assert dead and dead.isdisjoint(rows_of(written, 'activations'))
  ids = [
    row['id']
    for rows in rows_of(written, 'activations').values()
    for row in rows
  ]
  assert len(set(ids)) == len(ids) > LATENTS


def swapped(table, one, other):
  return table | {one: table[other], other: table[one]}


@pytest.mark.parametrize(
  ('change', 'name'),
  [
    (lambda t: t | {'top_acts': np.roll(t['top_acts'], 1, -1)}, 'values'),
    (lambda t: t | {'random_tokens': np.roll(t['random_tokens'], 1, 1)},
     'tokens'),
    (lambda t: swapped(t, 'vote_up_ids', 'vote_down_ids'), 'pos_str'),
    (lambda t: swapped(t, 'vote_up_logits', 'vote_down_logits'), 'neg_values'),
    (lambda t: swapped(t, 'max', 'density'), 'frac_nonzero'),
    (lambda t: t | {'hist_counts': np.roll(t['hist_counts'], 1, 1)},
     'binContains'),
    (lambda t: t | {'random_peak': np.roll(t['random_peak'], 1, 1)},
     'qualifyingTokenIndex'),
    (lambda t: {n: np.roll(of, 1, 0) if n != 'hist_edges' else of
                for n, of in t.items()}, 'activations'),
  ],
)  # fmt: skip
def test_control_another_table_is_told(made, written, change, name):
  _, table, words = made
  assert name in wrong(written, change(table), words)


def test_explanations_are_rows_that_the_import_takes(written):
  rows = rows_of(written, 'explanations')
  assert {n: rows[n][0]['description'] for n in rows} == {
    3: 'names of rivers',
    12: '"quoted"\nä',
  }
  for (row,) in rows.values():
    # References to rows that the database does not have would be refused.
    assert row['typeName'] is row['explanationModelName'] is None
    assert row['authorId'] == interchange.NEURONPEDIA_CREATOR
  assert rows[12][0]['notes'].endswith('balanced accuracy of detection 0.88')


def test_what_the_latents_are_of_is_named(written):
  about = {
    part: json.loads((written / f'{part}.jsonl').read_text())
    for part in ('release', 'sourceset', 'source', 'model')
  }
  assert about['model']['id'] == about['source']['modelId'] == 'gpt2-small'
  assert about['source']['id'] == '5-res__more'
  names = {about['source']['setName'], about['sourceset']['name']}
  assert names == {'res'}
  assert about['sourceset']['releaseName'] == about['release']['name']
  creators = {row['creatorId'] for row in about.values()}
  assert creators == {interchange.NEURONPEDIA_CREATOR}


def bundle_of(folder):
  """The rows of a bundle, but for when they were written."""
  return [
    {
      latent: [row | {'createdAt': ''} for row in rows]
      for latent, rows in of.items()
    }
    for of in (
      rows_of(folder, p) for p in ('features', 'activations', 'explanations')
    )
  ]


def test_a_bundle_is_whole_or_not_read(made, written, tmp_path, monkeypatch):
  folder = tmp_path / 'gpt2-small' / '5-res__more'
  latents = neuronpedia.latents

  def failing(block, *rest):
    if block['latent_ids'][0] >= 8:
      raise OSError(28, 'no space')
    return latents(block, *rest)

  with monkeypatch.context() as patch:
    patch.setattr(neuronpedia, 'latents', failing)
    with pytest.raises(OSError, match='no space'):
      bundle.write(CONFIG, made[0], str(tmp_path))
  names = {str(p.relative_to(folder)) for p in folder.rglob('*.*')}
  first = 'batch-0.jsonl.gz'
  assert names == {
    'made_from.json',
    *(
      f'{part}/{first}' for part in ('activations', 'explanations', 'features')
    ),
  }
  before = (folder / 'features' / first).read_bytes()
  bundle.write(CONFIG, made[0], str(tmp_path))
  assert bundle_of(folder) == bundle_of(written)
  # It was not made again.
  assert (folder / 'features' / first).read_bytes() == before
  with pytest.raises(errors.UserError, match='is a whole bundle already'):
    bundle.write(CONFIG, made[0], str(tmp_path))
  (folder / 'model.jsonl').unlink()
  monkeypatch.setattr(explanations, 'of_results', lambda *a: {})
  with pytest.raises(errors.UserError, match='results of other inputs'):
    bundle.write(CONFIG, made[0], str(tmp_path))


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('neuronpedia_model', '../up', 'no id of a model .* --neuronpedia_model'),
    ('neuronpedia_source', 'res', 'no id of a source .* --neuronpedia_source'),
    ('neuronpedia_source', '5-../up', 'no id of a source'),
  ],
)
def test_an_id_of_another_form_is_one_line(
  made, tmp_path, field, value, message
):
  with pytest.raises(errors.UserError, match=message) as error:
    bundle.write(DashboardConfig(**{field: value}), made[0], str(tmp_path))
  assert '\n' not in str(error.value)
  assert not list(tmp_path.iterdir())


def test_the_import_lists_all_files_of_any_number_of_latents(monkeypatch):
  monkeypatch.setattr(bundle, '_BATCH', 1024)
  for n_latents, size in ((10, 1024), (1024_000, 1024), (2**20, 2048)):
    assert bundle.batch_latents(n_latents) == size
    assert -(-n_latents // size) <= 1000


def test_intervals_of_odd_histograms():
  edges = np.array([1, 2, 4, 8], np.float32)
  block = {
    'max': np.array([8, 1.5, 0.5, np.nan], np.float32),
    'density': np.array([0.5, 0.5, 0.5, np.nan], np.float32),
    'hist_counts': np.array([[2, 3, 5], [10, 0, 0], [10, 0, 0], [0, 0, 0]]),
  }
  of = neuronpedia._intervals(block, edges).of
  # Fifths of 8 are 1.6, 3.2, 4.8 and 6.4: the last bin is the highest's.
  assert of(0, False, 1.5)['binContains'] == 0.1
  assert of(0, False, 5) == {'binMin': 4, 'binMax': 8, 'binContains': 0.25}
  # What is below the first edge was counted in its bin.
  assert of(1, False, 1.5) == {'binMin': 0, 'binMax': 1.5, 'binContains': 0.5}
  assert of(2, False, 0.5) == {'binMin': 0, 'binMax': 0.5, 'binContains': 0.5}
  assert of(3, True, 0) == {'binMin': -1, 'binMax': 0, 'binContains': -1}


def test_the_command_writes_a_bundle_named_after_the_site(
  made, tmp_path, capsys
):
  stage = binaries.MODULES['sae-probe']
  with binaries.defined(stage.define) as values:
    values(['-', f'--workdir={made[0]}', f'--export_neuronpedia={tmp_path}'])
    stage.work()
  folder = tmp_path / 'smollm2-135m' / '14-resid_post'
  (line,) = capsys.readouterr().out.splitlines()
  assert line == f'{folder}: 14 latents, 2 of them explained'
  assert (folder / 'model.jsonl').exists()
