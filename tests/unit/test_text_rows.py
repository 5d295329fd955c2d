"""Rows computed from text are those of a store of the text."""

import dataclasses
import itertools

import numpy as np
import pytest

from sae_jax import errors
from sae_jax import store as store_lib
from sae_jax.feed import text_rows
from sae_jax.harvesting import filling, pools
from tests.support import planted, runs, streamed, streams, toy

VARIANTS = [
  {'mask_norm_multiple': 0.0},
  {'mask_norm_multiple': 1.2, 'dtype': 'bfloat16', 'mask_first': False},
  {'pack': True, 'bos': 'a'},
]


@pytest.fixture
def data(texts, tmp_path):
  return streams.harvested(texts, tmp_path / 'store', n_tokens=900)


def assert_same_text(got, want):
  for name in ('tokens', 'documents', 'positions', 'stream_index'):
    np.testing.assert_array_equal(getattr(got, name)(), getattr(want, name)())
  assert got.n_train == want.n_train
  assert got.test_rows == want.test_rows
  assert got.manifest.mask == want.manifest.mask
  assert got.manifest.source_rows == want.manifest.source_rows


@pytest.mark.parametrize('changes', VARIANTS)
def test_they_are_those_of_the_store_in_any_order(texts, tmp_path, changes):
  data = streams.harvested(texts, tmp_path / 'store', n_tokens=900, **changes)
  rows = streamed.opened(data, tmp_path / 'text')
  assert_same_text(rows, data)
  n_rows = data.manifest.n_rows
  want_RD = data.read_rows(0, n_rows)
  runs.assert_same_bits(rows.finite_rows(0, n_rows), want_RD)
  # Of the end of a shard, the middle of a context, back again, one row.
  for start, stop in ((n_rows - 70, n_rows), (50, 146), (3, 9), (50, 51)):
    raw_BD = np.asarray(rows.on_devices(start, stop, 96))
    runs.assert_same_bits(raw_BD[: stop - start], want_RD[start:stop])
    # The rest are copies of the last, as where a store is read.
    assert (raw_BD[stop - start :] == want_RD[stop - 1]).all()
  # Control: the row after is another.
  assert not np.array_equal(rows.finite_rows(4, 10), want_RD[3:9])
  with pytest.raises(IndexError):
    rows.finite_rows(n_rows - 3, n_rows + 1)


def test_nothing_that_has_the_width_of_activations_is_written(data, tmp_path):
  rows = streamed.opened(data, tmp_path / 'text')
  rows.finite_rows(0, data.manifest.n_rows)
  names = {path.name for path in (tmp_path / 'text').iterdir()}
  assert names == {
    'plan.json', 'shards', 'manifest.json', 'stream_index', 'tokens',
    'documents', 'positions',
  }  # fmt: skip
  with pytest.raises(errors.UserError, match='text alone, no activations'):
    store_lib.open_store(rows.url)


def test_a_row_is_reached_without_those_before_it(data, tmp_path, monkeypatch):
  """Opened anew, as by a command that goes on; without the rule on norms."""
  streamed.opened(data, tmp_path / 'text')
  dispatched, whole = [], pools.Forward.dispatch
  monkeypatch.setattr(
    pools.Forward,
    'dispatch',
    lambda self, pool: dispatched.append(pool) or whole(self, pool),
  )
  rows = streamed.opened(data, tmp_path / 'text')
  assert not dispatched
  rows.on_devices(600, 660, 96)
  # A window of pools of 32 contexts of 20 tokens, in shards of 64 rows.
  assert 1 <= len(dispatched) <= 2
  # The same window serves the next batch.
  before = len(dispatched)
  rows.on_devices(655, 660, 96)
  assert len(dispatched) == before


@pytest.mark.parametrize('multiple', [0.0, 2.0])
def test_a_text_that_was_broken_off_goes_on_to_the_same_files(
  texts, tmp_path, monkeypatch, multiple
):
  data = streams.harvested(
    texts, tmp_path / 'store', n_tokens=900, mask_norm_multiple=multiple
  )
  streamed.opened(data, tmp_path / 'whole')
  finish, finished = filling.Filling.finish, itertools.count()

  def breaks_off(self):
    if next(finished) == 5:
      raise runs.Stop
    finish(self)

  with monkeypatch.context() as patch:
    patch.setattr(filling.Filling, 'finish', breaks_off)
    with pytest.raises(runs.Stop):
      streamed.opened(data, tmp_path / 'text')
  assert len(list((tmp_path / 'text' / 'shards').iterdir())) == 5
  streamed.opened(data, tmp_path / 'text')
  assert toy.stored(tmp_path / 'text') == toy.stored(tmp_path / 'whole')


def test_more_text_is_that_of_a_longer_store(texts, data, tmp_path):
  longer = streams.harvested(texts, tmp_path / 'longer', n_tokens=1500)
  rows = streamed.opened(data, tmp_path / 'text', n_tokens=1500)
  assert_same_text(rows, longer)
  n_rows = rows.manifest.n_rows
  assert n_rows > data.manifest.n_rows
  want_RD = longer.read_rows(0, n_rows)
  np.testing.assert_allclose(rows.finite_rows(0, n_rows), want_RD, atol=1e-5)


def test_what_text_is_the_same(texts, data, tmp_path):
  same = text_rows.recipe(data.about)
  assert same.is_same_text
  moved = tmp_path / 'moved' / texts.name
  moved.parent.mkdir()
  moved.write_bytes(texts.read_bytes())
  for change, is_same in (
    ({'n_tokens': 5000, 'holdout_fraction': 0.4}, True),
    ({'batch_contexts': 8, 'tokenizer_workers': 1}, True),
    ({'sources': (str(moved),)}, True),
    ({'context_length': 12}, False),
    ({'seed': 1}, False),
  ):
    recipe = text_rows.recipe(data.about, **change)
    assert recipe.is_same_text == is_same, change
    # What results are made from changes, but by what changes no row.
    changed = {name for name in change if name != 'tokenizer_workers'}
    assert (recipe.record != same.record) == bool(changed)
  moved.write_text('{"text": "another text"}\n')
  assert not text_rows.recipe(data.about, sources=(str(moved),)).is_same_text


def test_what_cannot_be_computed_is_refused(texts, data, tmp_path):
  def refused(message, about=data.about, **changes):
    with pytest.raises(errors.UserError, match=message):
      text_rows.recipe(about, **changes)

  refused('holds out no text to score: give --hold', holdout_fraction=0.0)
  refused('none.jsonl', sources=(str(tmp_path / 'none.jsonl'),))
  refused('holdout_fraction 2', holdout_fraction=2.0)
  planted.write_store(str(tmp_path / 'planted'))
  other = store_lib.open_store(str(tmp_path / 'planted'))
  refused('sae-harvest did not make.* give --store in place', other.about)
  short = tmp_path / 'short.jsonl'
  short.write_text('{"text": "a few words of it"}\n')
  with pytest.raises(errors.UserError, match='1 documents cannot be split'):
    streamed.opened(data, tmp_path / 'text', sources=(str(short),))


def test_a_row_that_is_not_finite_is_named(texts, tmp_path, monkeypatch):
  data = streams.harvested(
    texts, tmp_path / 'store', n_tokens=900, mask_norm_multiple=0.0
  )
  whole = toy.subject()
  tokens = data.tokens()[data.stream_index()]
  row = 400
  broken = {
    name: value.at[tokens[row]].set(np.nan) if name == 'embed' else value
    for name, value in whole.params.items()
  }
  first = int(np.argmax(tokens == tokens[row]))
  monkeypatch.setattr(
    toy, 'subject', lambda: dataclasses.replace(whole, params=broken)
  )
  rows = streamed.opened(data, tmp_path / 'text')
  with pytest.raises(
    errors.UserError, match=r'activation of row \d+ is not finite \(token'
  ) as raised:
    rows.finite_rows(0, data.manifest.n_rows)
  assert int(str(raised.value).split('row ')[1].split()[0]) <= first
  # A run that has met such tokens has left them out, and so does its text.
  harvested = streams.harvested(
    texts, tmp_path / 'broken', n_tokens=900, mask_norm_multiple=0.0
  )
  assert harvested.manifest.mask['masked_nonfinite']
  rows = streamed.opened(harvested, tmp_path / 'left_out')
  assert_same_text(rows, harvested)
  want_RD = harvested.read_rows(0, harvested.manifest.n_rows)
  runs.assert_same_bits(rows.finite_rows(0, len(want_RD)), want_RD)


def test_damaged_text_says_what_to_do(data, tmp_path):
  rows = streamed.opened(data, tmp_path / 'text')
  (path, *_) = sorted((tmp_path / 'text' / 'tokens' / 'c').iterdir())
  path.write_bytes(path.read_bytes()[:-3])
  with pytest.raises(errors.UserError, match='delete that folder, and the sam'):
    rows.finite_rows(0, 5)
