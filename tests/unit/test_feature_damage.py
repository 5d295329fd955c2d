"""Tables that are damaged or hostile are refused in one line."""

import json
import os
import random
import re
import shutil
import tracemalloc

import numpy as np
import pytest

from sae_jax import errors
from sae_jax import features as features_lib
from sae_jax.features import columns, results, writer
from sae_jax.storage import sharded, signed
from tests.support import synthetic_features

N = 70  # two shards
# More with SAE_JAX_FLIPS; 200 were tried.
FLIPS = int(os.environ.get('SAE_JAX_FLIPS', '4'))


@pytest.fixture(scope='module')
def made():
  arrays, _, vocabulary = synthetic_features.make(
    n_latents=N, n_examples=3, window=8, n_tokens=2000
  )
  return arrays, len(vocabulary)


@pytest.fixture(scope='module')
def sound(made, tmp_path_factory):
  folder = tmp_path_factory.mktemp('sound') / 'features'
  writer.write(folder, made[0], {'subject': 'made'})
  return folder


@pytest.fixture
def copy(sound, tmp_path):
  shutil.copytree(sound, tmp_path / 'features')
  return tmp_path / 'features'


def read(folder, vocabulary_size=None):
  """All that a table gives."""
  opened = features_lib.open(folder, vocabulary_size)
  arrays = {name: opened.column(name) for name in opened.columns}
  return opened.record, arrays


def refused(folder, message, vocabulary_size=None):
  with pytest.raises(errors.UserError, match=message) as raised:
    read(folder, vocabulary_size)
  assert str(raised.value).isprintable()


def edit(folder, sign=True, **changes):
  """Changes fields of the manifest, and its digest so that they agree."""
  path = folder / 'manifest.json'
  content = json.loads(path.read_text()) | changes
  content.pop('sha256')
  content = {k: v for k, v in content.items() if v is not None}
  if sign:
    content['sha256'] = signed.digest(content)
  path.write_text(json.dumps(content))


def flip(path, rng):
  data = bytearray(path.read_bytes())
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)


def test_a_flipped_bit_is_named_or_without_effect(made, copy, sound):
  """And `verify` names each one."""
  record, arrays = read(sound)
  names = sorted(
    str(path.relative_to(copy))
    for path in copy.rglob('*')
    if path.is_file() and 'shards' not in path.parts
  )
  named = 0
  for seed in range(5 * FLIPS):
    rng = random.Random(seed)
    name = rng.choice(names)
    data = (copy / name).read_bytes()
    flip(copy / name, rng)
    column, _, shard = name.partition('/c/')
    with pytest.raises(errors.UserError, match=re.escape(name)):
      features_lib.open(copy).verify()
    try:
      got_record, got = read(copy)
      assert got_record == record
      for key, array in got.items():
        np.testing.assert_array_equal(array, arrays[key])
    except errors.UserError as error:
      named += 1
      if shard:
        assert f'cannot read {name} of features' in str(error)
        assert 'run sae-probe again' in str(error)
        # The other shard, and other columns, can be read.
        opened = features_lib.open(copy)
        first = 0 if shard.startswith('1') else 64
        if not columns.COLUMNS[column].is_shared:
          opened.latents(first, min(first + 64, N))
          others = [n for n in opened.latents(0, 0) if n != column]
          opened.latents(0, N, others)
    (copy / name).write_bytes(data)
  # Not all: zarr.json is for other readers.
  assert named > 2 * FLIPS


def test_a_lost_object_does_not_pass_for_zeros(copy):
  (copy / 'top_acts' / 'c' / '1' / '0' / '0').unlink()
  refused(copy, 'cannot read top_acts/c/1/0/0 of features .* run sae-probe')
  with pytest.raises(errors.UserError, match=r'1 objects .*/1/0/0 is not ther'):
    features_lib.open(copy).verify()


def test_an_object_of_another_table_is_named(made, copy, tmp_path):
  other = made[0] | {'count': made[0]['count'][::-1]}
  writer.write(tmp_path / 'other', other)
  (copy / 'count' / 'c' / '0').write_bytes(
    (tmp_path / 'other' / 'count' / 'c' / '0').read_bytes()
  )
  read(copy)
  with pytest.raises(errors.UserError, match='count/c/0 is not what was writt'):
    features_lib.open(copy).verify()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'format_version': 9}, 'format version 9, this sae_jax reads version 1'),
    ({'colour': 'red'}, 'no field colour'),
    ({'n_latents': 2**40}, '1,099,511,627,776 latents, not from 1'),
    ({'n_latents': -1}, '-1 latents, not from 1'),
    ({'n_latents': '70'}, "n_latents is '70', not of the type int"),
    ({'n_latents': 64}, 'says 2 checksums of latent_ids, not 1'),
    ({'n_latents': 2**30}, 'says shards of 64 and chunks of 64 latents, not'),
    ({'shard_latents': 2**40}, 'says shards of 1099511627776'),
    ({'chunk_latents': 0}, 'and chunks of 0 latents'),
    ({'sizes': {}}, 'sizes of the axes .* are missing'),
    ({'columns': {}}, 'features lack count'),
    ({'checksums': {}}, 'says 0 checksums of latent_ids, not 2'),
    ({'checksums': {'latent_ids': [3]}}, 'is 3, not of the type str'),
    ({'record': None}, 'lacks record'),
    ({'metadata': {'../zarr.json': ''}}, r'of zarr.json \(\.\./zarr.json\)'),
  ],
)
def test_a_manifest_that_is_not_of_one_table_is_refused(copy, change, message):
  edit(copy, **change)
  refused(copy, message)


@pytest.mark.parametrize(
  ('axis', 'size', 'message'),
  [
    ('W', 2**40, 'top_tokens takes .* bytes for a latent'),
    ('M top', -1, 'top_tokens takes -'),
    ('H', 0, '0 bins and windows of 8'),
    ('H', 2**21 + 1, 'hist_counts takes 16,777,224 bytes for a latent'),
    ('colour', 1, 'sizes of the axes colour are missing or of no column'),
  ],
)
def test_sizes_are_compared_before_anything_is_read(copy, axis, size, message):
  sizes = json.loads((copy / 'manifest.json').read_text())['sizes']
  edit(copy, sizes=sizes | {axis: size})
  tracemalloc.start()
  refused(copy, message)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2**22


def test_columns_are_those_that_are_declared(copy):
  declared = json.loads((copy / 'manifest.json').read_text())['columns']
  other = {'axes': ['N'], 'dtype': 'object', 'meaning': ''}
  for name, column, message in (
    ('kurtosis', other, r"have \['kurtosis'\]: run sae-probe of this version"),
    ('near_count', other, 'features lack near_acts, near_document, near_peak'),
    ('count', declared['count'] | {'dtype': 'object'}, 'object as dtype of'),
    ('count', declared['count'] | {'axes': ['W']}, "'W'] as axes of count"),
    ('count', {}, 'says None as axes of count'),
  ):
    edit(copy, columns=declared | {name: column})
    refused(copy, message)
    edit(copy, columns=declared)
  lacking = {n: column for n, column in declared.items() if n != 'skew'}
  edit(copy, columns=lacking)
  refused(copy, 'features lack skew: run sae-probe of this version')


def test_an_edited_manifest_is_named(copy):
  path = copy / 'manifest.json'
  text = path.read_text()
  path.write_text(text.replace('"made"', '"trained"'))
  refused(copy, r'manifest\.json was edited')
  edit(copy, sign=False)
  refused(copy, r'manifest\.json was edited')
  for data in ('[' * 200_000, '', '[]', '{'):
    path.write_text(data)
    refused(copy, r'manifest\.json is not JSON as it should be')


def test_data_of_another_shape_is_no_column(made, copy, tmp_path):
  """Objects of another width, which their checksums vouch for."""
  wide = made[0] | {
    name: np.repeat(made[0][name], 2, axis=1)
    for name in ('vote_up_ids', 'vote_up_logits')
  }
  writer.write(tmp_path / 'wide', wide)
  shutil.rmtree(copy / 'vote_up_ids')
  shutil.copytree(tmp_path / 'wide' / 'vote_up_ids', copy / 'vote_up_ids')
  refused(copy, 'cannot read vote_up_ids/c/0/0 of features')


@pytest.mark.parametrize(
  ('name', 'value', 'message'),
  [
    ('top_acts', np.nan, 'top_acts holds numbers from nan to nan'),
    ('top_acts', -1.0, 'top_acts holds numbers from -1'),
    ('vote_up_logits', np.inf, 'vote_up_logits holds numbers from'),
    ('density', 1.5, 'density holds numbers from .* to 1.5, which is no share'),
    ('count', -1, 'count holds numbers from -1'),
    ('random_tokens', -2, 'random_tokens holds numbers from -2'),
    ('top_peak', 8, 'top_peak names places without a token in windows of 8'),
    ('random_document', -(2**31), 'random_document holds numbers from -214'),
    ('neighbour_cosines', np.nan, 'neighbour_cosines holds'),
    ('neighbour_cosines', 1.5, 'cosines holds numbers from .* to 1.5'),
    ('neighbour_ids', N, f'neighbour_ids holds latent {N} of {N}'),
    ('latent_ids', 3, 'latent_ids holds latent 3 in row 69'),
  ],
)
def test_numbers_that_cannot_be_are_refused(
  made, tmp_path, name, value, message
):
  odd = made[0][name].copy()
  # Of the last latent, in the second shard.
  odd[-1].flat[0] = value
  if not odd[-1].shape:
    odd[-1] = value
  if name.startswith(('top_', 'random_')):
    odd[-1][...] = value
  writer.write(tmp_path, made[0] | {name: odd})
  message = f'shard 1 of features {re.escape(str(tmp_path))}: .*{message}'
  opened = features_lib.open(tmp_path, made[1])
  opened.latents(0, 64)
  with pytest.raises(errors.UserError, match=message):
    opened.latents(0, N)
  # Only what is read is checked.
  opened.latents(0, N, [n for n in opened.latents(0, 0) if n != name])


def test_a_peak_is_on_a_token(made, tmp_path):
  arrays, vocabulary_size = made
  latent = int(np.flatnonzero(arrays['top_peak'][:, 0] >= 0)[0])
  tokens = arrays['top_tokens'].copy()
  tokens[latent, 0, arrays['top_peak'][latent, 0]] = -1
  writer.write(tmp_path, arrays | {'top_tokens': tokens})
  opened = features_lib.open(tmp_path, vocabulary_size)
  with pytest.raises(errors.UserError, match='top_peak names places without'):
    opened.latents(0, N)


@pytest.mark.parametrize(
  'name', [n for n in columns.of_groups() if columns.COLUMNS[n].is_token]
)
def test_each_column_of_tokens_is_checked_against_the_vocabulary(
  made, tmp_path, name
):
  arrays, vocabulary_size = made
  outside = arrays[name].copy()
  outside.flat[0] = vocabulary_size
  writer.write(tmp_path, arrays | {name: outside})
  read(tmp_path, vocabulary_size + 1)
  refused(tmp_path, f'{name} holds token {vocabulary_size}', vocabulary_size)


@pytest.mark.parametrize(
  'odd',
  [{'subject': 3}, {'n_latents': '70'}, {'n_latents': True}, {'n_latents': {}}],
)
def test_a_report_says_what_its_features_are(made, tmp_path, odd):
  arrays, _ = made
  report = {'subject': 'made', 'n_latents': N}
  synthetic_features.write_results(tmp_path, {}, report, arrays)
  assert results.read_report(tmp_path) == report
  assert results.open_features(tmp_path, report).n_latents == N
  other = report | {'n_latents': N - 1}
  with pytest.raises(errors.UserError, match='is of 70 latents, the report of'):
    results.open_features(tmp_path, other)
  results.write(tmp_path, {}, report | odd)
  key = next(iter(odd))
  with pytest.raises(errors.UserError, match=f'as {key}: run sae-probe again'):
    results.read_report(tmp_path)


def test_what_was_begun_of_the_same_stays(made, tmp_path):
  report = {'subject': 'made', 'n_latents': N}
  plan, url = writer.plan(made[0]), results.features_url(tmp_path)
  made_from, other = {'versions': 1}, {'versions': 2}
  results.begin(tmp_path, made_from)
  table = features_lib.TableWriter(url, plan)
  table.write(64, {'count': made[0]['count'][64:]})
  shard = tmp_path / 'features' / 'count' / 'c' / '1'
  results.begin(tmp_path, made_from)
  assert shard.exists()
  results.begin(tmp_path, other)
  assert not shard.exists()
  (tmp_path / 'features.npz').write_bytes(b'PK')
  synthetic_features.write_results(tmp_path, made_from, report, made[0])
  assert not (tmp_path / 'features.npz').exists()
  assert results.are_finished(tmp_path, made_from)
  assert not results.are_finished(tmp_path, other)
  # What is finished is damaged, if it is begun again.
  flip(shard, random.Random(0))
  assert not results.are_finished(tmp_path, made_from)
  synthetic_features.write_results(tmp_path, made_from, report, made[0])
  assert results.are_finished(tmp_path, made_from)


def test_edges_that_do_not_rise_are_refused(made, copy):
  edges = made[0]['hist_edges'][::-1]
  kind = sharded.Kind(edges.dtype, (), len(edges), len(edges), True)
  (copy / 'hist_edges' / 'c' / '0').write_bytes(sharded.encode(kind, edges))
  refused(copy, 'shard 0 of features .*: hist_edges do not rise: run sae-probe')
