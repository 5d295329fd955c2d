"""Held-out rows are validation or test rows, whole documents of each."""

import json
import types

import numpy as np
import pytest

from sae_jax import errors, store
from sae_jax.storage import signed
from sae_jax.store import manifest as manifest_lib
from tests.support import planted, small

CONTEXT = 16


def write(url, rows_per_document, held_out, shard_rows=small.SHARD):
  """A store of documents of so many rows, the last of them held out; opened.

  A context holds what is left of one document and the beginning of the next.
  """
  documents = np.repeat(np.arange(len(rows_per_document)), rows_per_document)
  n_rows = len(documents)
  data = {
    'tokens': np.arange(n_rows),
    'documents': documents,
    'positions': np.arange(n_rows) % CONTEXT,
    'keep_mask': np.ones(n_rows, bool),
    'kept': np.zeros((n_rows, small.D), np.float32),
  }
  held = sum(rows_per_document[len(rows_per_document) - held_out :])
  small.write(str(url), data, holdout_rows=held, shard_rows=shard_rows)
  return store.open_store(str(url))


def numbers(opened, rows):
  """Numbers of the documents that rows are of, by the arrays themselves."""
  documents = opened.documents()[opened.stream_index()]
  return set(documents[rows.start : rows.stop].tolist())


def of_splits(opened):
  """Numbers of the documents of training, validation and test."""
  training = range(opened.n_train)
  return [
    numbers(opened, rows)
    for rows in (training, opened.validation_rows, opened.test_rows)
  ]


@pytest.mark.parametrize(
  ('rows_per_document', 'held_out', 'n_validation'),
  [
    ((30, 10, 10), 2, 10),
    # The border that is the nearest to the middle.
    ((30, 9, 30, 40, 5), 4, 39),
    ((30, 1, 90, 50), 3, 91),
    ((30, 90, 1), 2, 90),
    ((30, 1, 90), 2, 1),
    # Of two as near the earlier one.
    ((30, 20, 20, 20), 3, 20),
    # Documents that go on over many shards.
    ((40, 3, 100, 200, 3), 4, 103),
    ((40, 3, 200, 100, 3), 4, 203),
    ((5,) * 60, 40, 100),
  ],
)
def test_the_border_is_a_document_s_and_near_the_middle(
  tmp_path, rows_per_document, held_out, n_validation
):
  opened = write(tmp_path, rows_per_document, held_out)
  n_train, n_rows = opened.n_train, opened.manifest.n_rows
  assert opened.validation_rows == range(n_train, n_train + n_validation)
  assert opened.test_rows == range(n_train + n_validation, n_rows)
  training, validation, test = of_splits(opened)
  assert not training & validation | training & test | validation & test
  every = set(range(len(rows_per_document)))
  assert training | validation | test == every


def test_control_a_border_within_a_document_would_be_seen(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(
    manifest_lib,
    'first_test_row',
    lambda manifest, _: manifest.n_rows - manifest.holdout_rows // 2,
  )
  opened = write(tmp_path, (30, 9, 30, 40, 5), 4)
  _, validation, test = of_splits(opened)
  assert validation & test


@pytest.mark.parametrize('seed', range(50))
def test_no_other_border_is_nearer(seed):
  rng = np.random.default_rng(seed)
  rows = rng.integers(1, rng.choice([4, 60]), rng.integers(3, 30))
  held_out = int(rng.integers(2, len(rows)))
  n_rows, n_held = int(rows.sum()), int(rows[-held_out:].sum())
  of_row = np.repeat(np.arange(len(rows)), rows)
  first = manifest_lib.first_test_row(
    types.SimpleNamespace(n_rows=n_rows, holdout_rows=n_held),
    lambda row: of_row[row],
  )
  borders = n_rows - n_held + np.cumsum(rows[-held_out:])[:-1]
  assert first in borders
  distances = abs(borders - (n_rows - n_held / 2))
  assert abs(first - (n_rows - n_held / 2)) == distances.min()


def test_few_rows_are_looked_at():
  # Each may be of another shard, whose record is read for it.
  looked_at = []

  def document(row):
    looked_at.append(row)
    return row // 1000

  manifest = types.SimpleNamespace(n_rows=10**10, holdout_rows=10**9)
  first = manifest_lib.first_test_row(manifest, document)
  assert first == 10**10 - 5 * 10**8
  assert len(looked_at) < 70


@pytest.mark.parametrize('rows', [1, 7, 70])
def test_a_single_held_out_document_is_both_and_said_to_be(
  tmp_path, caplog, rows
):
  opened = write(tmp_path, (40, 20, rows), 1)
  assert not caplog.text
  held_out = range(60, 60 + rows)
  assert opened.validation_rows == opened.test_rows == held_out
  assert opened.test_rows == held_out
  (warning,) = caplog.messages
  assert f'one document: its {rows} rows are both validation and' in warning
  assert '\n' not in warning


def test_what_holds_nothing_out_has_no_such_rows(tmp_path, caplog):
  opened = write(tmp_path / 'sealed', (20, 20), 0)
  assert opened.validation_rows == opened.test_rows == range(40, 40)
  small.begin(str(tmp_path / 'begun'), small.data())
  begun = store.open_store(str(tmp_path / 'begun'), unsealed=True)
  assert not begun.validation_rows and not begun.test_rows
  assert not caplog.text


def test_a_record_that_the_manifest_does_not_vouch_for_is_named(tmp_path):
  # No split is asked for before somebody needs it.
  opened = write(tmp_path, (30, 10, 10), 2)
  last = len(opened.manifest.shard_counts) - 1
  path = tmp_path / f'shards/{last:06d}.json'
  content = json.loads(path.read_text())
  content['documents'] = content['documents'][::-1]
  content['sha256'] = signed.digest(
    {name: value for name, value in content.items() if name != 'sha256'}
  )
  path.write_text(json.dumps(content))
  with pytest.raises(errors.UserError, match=f'{path.name} in .* not the sha'):
    _ = opened.validation_rows
  path.unlink()
  with pytest.raises(errors.UserError, match=f'{path.name} in .* is not there'):
    _ = store.open_store(str(tmp_path)).test_rows


def test_splits_are_of_the_version_that_is_opened(tmp_path):
  # Nothing on disk says where the border is: a store of before has it too.
  planted.write_store(str(tmp_path), holdout_documents=4)
  opened = store.open_store(str(tmp_path))
  assert 'validation' not in (tmp_path / 'manifest.json').read_text()
  assert len(opened.validation_rows) == len(opened.test_rows) == 2 * 95
  assert of_splits(opened)[1:] == [{18, 19}, {20, 21}]
