"""The feature table: columns, layout, writing in any order, reading blocks."""

import csv
import hashlib
import json
import re
import shutil

import numpy as np
import pytest

from sae_jax import errors
from sae_jax import features as features_lib
from sae_jax.features import columns, export, manifest, writer
from tests.support import documents, synthetic_features

N = 150  # three shards of 64, the last one not full


def optional(n_latents, rng, vocabulary_size):
  """The columns that a table need not have."""
  sizes = {'M near': 2, 'deciles': 10, 'M decile': 1, 'W': 8}
  sizes |= {'tokens': 4, 'partners': 3, 'tasks': 2, 'V effect': 2}
  arrays = {}
  for name, column in columns.COLUMNS.items():
    if column.group:
      shape = (n_latents, *column.row(sizes))
      most = vocabulary_size if column.is_token else min(8, column.most)
      numbers = rng.integers(0, int(most), shape)
      arrays[name] = numbers.astype(column.dtype)
  return arrays


@pytest.fixture(scope='module')
def made():
  arrays, _, vocabulary = synthetic_features.make(
    n_latents=N, n_examples=3, window=8, n_tokens=2000
  )
  rng = np.random.default_rng(0)
  return arrays | optional(N, rng, len(vocabulary)), len(vocabulary)


@pytest.fixture(scope='module')
def folder(made, tmp_path_factory):
  folder = tmp_path_factory.mktemp('table') / 'features'
  writer.write(folder, made[0], {'subject': 'made'})
  return folder


def contents(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


def rows(arrays):
  return {n: a for n, a in arrays.items() if not columns.COLUMNS[n].is_shared}


def test_a_table_has_the_declared_columns_and_types(made):
  arrays, _ = made
  assert arrays.keys() == columns.COLUMNS.keys()
  for name, column in columns.COLUMNS.items():
    assert arrays[name].dtype == column.dtype
    assert arrays[name].ndim == len(column.axes)


@pytest.mark.parametrize(
  ('start', 'stop'), [(0, N), (0, 64), (60, 70), (63, 129), (149, 150), (9, 9)]
)
def test_blocks_are_the_arrays(made, folder, start, stop):
  arrays, vocabulary_size = made
  opened = features_lib.open(folder, vocabulary_size)
  assert (opened.n_latents, opened.shard_latents) == (N, 64)
  assert opened.record == {'subject': 'made'}
  block = opened.latents(start, stop)
  assert block.keys() == rows(arrays).keys()
  for name, array in block.items():
    np.testing.assert_array_equal(array, arrays[name][start:stop])
    assert array.dtype == arrays[name].dtype


def test_columns_are_read_by_name(made, folder):
  arrays, _ = made
  opened = features_lib.open(str(folder))
  assert list(opened.latents(3, 5, ['max', 'count'])) == ['max', 'count']
  for name in ('hist_edges', 'density', 'decile_acts'):
    np.testing.assert_array_equal(opened.column(name), arrays[name])
  with pytest.raises(KeyError, match='kurtosis'):
    opened.latents(0, 1, ['kurtosis'])
  for start, stop in ((-1, 2), (3, 2), (0, N + 1)):
    with pytest.raises(IndexError, match=f'of a table of {N}'):
      opened.latents(start, stop)


def test_zarr_reads_it_without_this_library(made, folder):
  zarr = pytest.importorskip('zarr')
  group = zarr.open_group(str(folder), mode='r')
  for name, array in made[0].items():
    np.testing.assert_array_equal(group[name][:], array)
    column = columns.COLUMNS[name]
    assert group[name].metadata.dimension_names == column.axes
    assert group[name].attrs['meaning'] == column.meaning
  assert dict(group.attrs) == {'subject': 'made'}


def test_the_document_has_every_column():
  text = (documents.ROOT / 'docs' / 'features.md').read_text()
  rows = [line for line in text.splitlines() if line.startswith('| `')]
  assert rows == [
    f'| `{name}` | {", ".join(column.axes)} | {column.dtype} | '
    f'{column.group or "all"} | {column.meaning} |'
    for name, column in columns.COLUMNS.items()
  ]


def test_the_layout_is_sharded_zarr(folder):
  metadata = json.loads((folder / 'top_acts' / 'zarr.json').read_text())
  assert metadata['shape'] == [N, 3, 8]
  grid = metadata['chunk_grid']['configuration']
  assert grid['chunk_shape'] == [64, 3, 8]
  (codec,) = metadata['codecs']
  assert codec['name'] == 'sharding_indexed'
  inner = codec['configuration']
  assert inner['chunk_shape'] == [64, 3, 8]
  names = [codec['name'] for codec in inner['codecs']]
  assert names == ['bytes', 'zstd', 'crc32c']
  assert len(list((folder / 'top_acts' / 'c').iterdir())) == 3


@pytest.mark.parametrize(
  ('n_latents', 'size'),
  [(1, 64), (4096, 64), (8191, 64), (8192, 128), (2**20, 2**14),
   (2**20 - 1, 2**13), (2**24, 2**14)],
)  # fmt: skip
def test_a_shard_is_a_function_of_the_number_of_latents(n_latents, size):
  assert manifest.shard_latents(n_latents) == size


def test_the_manifest_vouches_for_every_object(folder):
  content = json.loads((folder / 'manifest.json').read_text())
  listed = dict(content['metadata'])
  for name, digests in content['checksums'].items():
    tail = '/0' * (len(content['columns'][name]['axes']) - 1)
    tail = '' if name == 'hist_edges' else tail
    listed |= {f'{name}/c/{i}{tail}': d for i, d in enumerate(digests)}
  files = contents(folder)
  assert {n: hashlib.sha256(files[n]).hexdigest() for n in listed} == listed
  others = {n for n in files if not n.startswith('shards/')} - listed.keys()
  assert others == {'manifest.json'}
  assert features_lib.open(folder).verify() == sum(
    len(files[name]) for name in listed
  )


def test_bytes_are_those_of_the_content_alone(made, folder, tmp_path):
  """Written by others, in other types and order, some of it twice."""
  arrays = rows(made[0])
  plan = writer.plan(made[0])
  swapped = features_lib.Plan(
    plan.n_latents,
    dict(reversed(plan.sizes.items())),
    plan.hist_edges,
    tuple(reversed(plan.groups)),
  )
  writers = [features_lib.TableWriter(tmp_path, p) for p in (plan, swapped)]
  wide = {
    name: np.asfortranarray(
      array.astype('f8' if array.dtype.kind == 'f' else 'i8')
    )
    for name, array in reversed(arrays.items())
  }
  for number, (first, stop) in reversed(list(enumerate(writers[0].blocks()))):
    block = {name: array[first:stop] for name, array in wide.items()}
    writers[number % 2].write(first, block)
  writers[0].write(64, {n: a[64:] for n, a in arrays.items()})
  writers[1].seal({'subject': 'made'})
  # What a killed process of TensorStore leaves.
  (tmp_path / 'count' / 'c' / '0.__lock').write_text('')
  (tmp_path / 'manifest.json.__lock').write_text('')
  files = contents(tmp_path)
  assert contents(folder).items() <= files.items()
  assert len(files) == len(contents(folder)) + 2
  features_lib.open(tmp_path).verify()


def test_columns_are_written_in_any_parts(made, folder, tmp_path):
  table = features_lib.TableWriter(tmp_path, writer.plan(made[0]))
  arrays = rows(made[0])
  table.write(0, {'count': arrays.pop('count')})
  first, *others = table.blocks()
  for start, stop in others:
    table.write(start, {n: a[start:stop] for n, a in arrays.items()})
  # A killed one lacks a shard.
  with pytest.raises(errors.UserError, match=r'lack latent_ids/c/0: run sae-'):
    table.seal({})
  assert not (tmp_path / 'manifest.json').exists()
  with pytest.raises(errors.UserError, match='is no finished feature table'):
    features_lib.open(tmp_path)
  table.write(first[0], {n: a[: first[1]] for n, a in arrays.items()})
  table.seal({'subject': 'made'})
  sealed, whole = contents(tmp_path), contents(folder)
  for name in whole:
    if not name.startswith('shards/'):
      assert sealed[name] == whole[name], name


def test_an_object_that_went_missing_is_seen_at_the_seal(made, tmp_path):
  table = features_lib.TableWriter(tmp_path, writer.plan(made[0]))
  table.write(0, rows(made[0]))
  (tmp_path / 'max' / 'c' / '1').unlink()
  with pytest.raises(errors.UserError, match='lack max/c/1: run sae-probe'):
    table.seal({})


def test_other_bytes_are_an_error_that_names_the_object(made, tmp_path):
  table = features_lib.TableWriter(tmp_path, writer.plan(made[0]))
  table.write(0, rows(made[0]))
  before = contents(tmp_path)
  other = made[0]['count'].copy()
  other[70] += 1
  with pytest.raises(errors.UserError, match=r'count/c/1 .* with other bytes'):
    table.write(64, {'count': other[64:128]})
  assert contents(tmp_path) == before
  table.seal({'a': 1})
  for name in ('zarr', 'manifest'):
    with pytest.raises(
      errors.UserError, match=rf'^{name}\.json .* other bytes'
    ):
      table.seal({'a': 2})
    (tmp_path / 'zarr.json').unlink()
  table.seal({'a': 1})


def test_a_shard_of_another_plan_is_not_sealed(made, tmp_path):
  other = rows(made[0]) | {'hist_edges': made[0]['hist_edges'] * 2}
  plan = writer.plan(other)
  features_lib.TableWriter(tmp_path, plan).write(0, rows(made[0]))
  with pytest.raises(errors.UserError, match=r'json .* is of another plan'):
    features_lib.TableWriter(tmp_path, writer.plan(made[0])).seal({})


@pytest.mark.parametrize(
  ('first', 'change', 'said'),
  [
    (1, {}, 'latents from 1 are not whole shards of 64'),
    (0, {'count': np.zeros(63)}, '63 latents from 0 are not whole shards'),
    (64, {'count': np.zeros(64), 'max': np.zeros(86)}, '0 latents from 64'),
    (0, {'count': np.zeros((64, 1))}, r'count has shape \(64, 1\), not'),
    (0, {'top_acts': np.zeros((64, 3, 9))}, r'top_acts has shape'),
    (0, {'kurtosis': np.zeros(64)}, 'kurtosis is no column of latents'),
    (0, {'hist_edges': np.zeros(41)}, 'hist_edges is no column of latents'),
    (0, {'top_peak': np.full((64, 3), 2**32)}, 'numbers that int32 does not'),
    (0, {'count': np.full(64, 0.5)}, 'count holds numbers that int64 does not'),
  ],
)
def test_what_is_no_block_is_refused(made, tmp_path, first, change, said):
  table = features_lib.TableWriter(tmp_path, writer.plan(made[0]))
  with pytest.raises(ValueError, match=said):
    table.write(first, change or {'count': made[0]['count'][1:65]})
  assert not list(tmp_path.iterdir())


def test_arrays_that_are_no_table_are_refused(made, tmp_path):
  arrays, _ = made

  def refused(said, **changes):
    table = {k: v for k, v in (arrays | changes).items() if v is not None}
    with pytest.raises(ValueError, match=said):
      writer.write(tmp_path, table)

  refused(re.escape("missing: ['skew']"), skew=None)
  refused(re.escape("missing: ['near_peak']"), near_peak=None)
  refused('kurtosis is no column', kurtosis=arrays['skew'])
  refused(r'count has shape \(150, 1\)', count=arrays['count'][:, None])
  refused(
    'top_peak has 2 along M top but top_tokens has 3',
    top_peak=arrays['top_peak'][:, :2],
  )
  refused(
    'hist_counts has 40 along H but hist_edges has 39',
    hist_edges=arrays['hist_edges'][1:],
  )
  refused('40 bins: they must rise', hist_edges=arrays['hist_edges'][::-1])


def test_groups_of_columns_and_axes_may_be_absent(made, tmp_path):
  arrays, vocabulary_size = made
  names = columns.of_groups(['tokens'])
  assert {'token_ids', 'count'} <= set(names) and 'near_count' not in names
  table = {name: arrays[name] for name in names}
  table |= {n: a[:, :0] for n, a in table.items() if n.startswith('token_')}
  writer.write(tmp_path, table)
  opened = features_lib.open(tmp_path, vocabulary_size)
  assert tuple(opened.columns) == names
  assert opened.sizes['tokens'] == 0 and 'partners' not in opened.sizes
  assert opened.latents(60, 70)['token_ids'].shape == (10, 0)
  assert opened.column('token_counts').shape == (N, 0)
  assert not (tmp_path / 'token_ids' / 'c').exists()
  opened.verify()
  zarr = pytest.importorskip('zarr')
  group = zarr.open_group(str(tmp_path), mode='r')
  assert group['token_ids'][:].shape == (N, 0)


def test_a_table_is_cleared_for_another(made, tmp_path):
  writer.clear(tmp_path / 'features')
  writer.write(tmp_path / 'features', made[0])
  writer.clear(tmp_path / 'features')
  half = {
    name: array if columns.COLUMNS[name].is_shared else array[:70]
    for name, array in made[0].items()
  }
  half['neighbour_ids'] = half['neighbour_ids'] % 70
  writer.write(tmp_path / 'features', half)
  opened = features_lib.open(tmp_path / 'features')
  assert opened.n_latents == 70
  opened.latents(0, 70)


def test_a_folder_that_cannot_be_written_is_one_line(made, tmp_path):
  (tmp_path / 'file').write_text('')
  table = features_lib.TableWriter(
    tmp_path / 'file' / 'features', writer.plan(made[0])
  )
  with pytest.raises(errors.UserError, match='cannot write features') as caught:
    table.write(0, rows(made[0]))
  assert str(caught.value).isprintable()


def test_a_plan_is_checked_before_anything_is_written(tmp_path, made):
  plan = writer.plan(made[0])

  def refused(said, **changes):
    fields = {
      'n_latents': N,
      'sizes': plan.sizes,
      'hist_edges': plan.hist_edges,
      'groups': plan.groups,
    }
    with pytest.raises((errors.UserError, ValueError), match=said):
      features_lib.TableWriter(tmp_path, features_lib.Plan(**fields | changes))

  refused('0 latents, not from 1', n_latents=0)
  refused('2,147,483,648 latents', n_latents=2**31)
  refused('top_tokens takes .* for a latent', sizes=plan.sizes | {'W': 2**24})
  refused('M top are missing', sizes={k: v for k, v in plan.sizes.items()
                                      if k != 'M top'})  # fmt: skip
  refused('V effect are missing or of no column', groups=plan.groups[:-1])
  refused('windows of 0 tokens', sizes=plan.sizes | {'W': 0})
  refused('41 edges of 39 bins', sizes=plan.sizes | {'H': 39})
  assert not list(tmp_path.iterdir())
  shutil.rmtree(tmp_path)


@pytest.mark.parametrize('kind', ['.csv', '.parquet'])
def test_a_table_is_exported_as_one_file(folder, tmp_path, kind):
  opened = features_lib.open(folder)
  path = tmp_path / f'latents{kind}'
  export.export(opened, str(path))
  if kind == '.csv':
    with open(path, newline='') as file:
      rows = list(csv.DictReader(file))
    lists = False
  else:
    rows = pytest.importorskip('pyarrow.parquet').read_table(path).to_pylist()
    lists = True
  assert len(rows) == opened.n_latents
  wanted = {
    name
    for name, column in opened.columns.items()
    if column.axes == ('N',)
    or (lists and len(column.axes) == 2 and column.axes[0] == 'N')
  } - {'hist_counts'}
  assert set(rows[0]) == wanted and ('vote_up_ids' in wanted) == lists
  for name in wanted:
    for row, want in zip(rows, opened.column(name)):
      if np.ndim(want):
        np.testing.assert_array_equal(row[name], want)
      elif np.isfinite(want):
        assert np.float32(row[name]) == np.float32(want)
      else:
        assert row[name] in ('', None)
  # The same bytes each time, and no part of a file where it fails.
  before = path.read_bytes()
  export.export(opened, str(path))
  assert path.read_bytes() == before
  with pytest.raises(errors.UserError, match='does not end in '):
    export.export(opened, str(tmp_path / 'latents.txt'))
  with pytest.raises(errors.UserError, match='cannot write'):
    export.export(opened, str(path / f'inside{kind}'))
