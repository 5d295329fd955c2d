"""Batches from text: rows that a longer store would hold, mixed, resumable."""

import dataclasses
import json
import pathlib
import re
import threading
import time

import numpy as np
import pytest
from scipy import spatial

from sae_jax import autoencoder, errors
from sae_jax import subject as subject_lib
from sae_jax.feed import device_window, from_text, order
from sae_jax.storage import signed
from sae_jax.store import layout, manifest
from sae_jax.store.manifest import Mask
from sae_jax.training import train
from tests.support import planted, runs, streams, toy


@pytest.fixture
def opened(texts, tmp_path):
  return streams.harvested(texts, tmp_path / 'store')


def _rest(texts, tmp_path, opened, **changes):
  """Rows that a store of all text has of contexts beyond the small one's."""
  whole = streams.harvested(
    texts, tmp_path / 'whole', n_tokens=10**6, **changes
  )
  beyond = whole.documents() > opened.documents()[-1]
  context = int(np.argmax(beyond & (whole.positions() == 0)))
  first = int(np.searchsorted(whole.stream_index(), context))
  return whole.read_rows(first, whole.manifest.n_rows)


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'pack': True, 'bos': 'a'},
    {'dtype': 'bfloat16', 'mask_first': False, 'mask_norm_multiple': 1.2},
  ],
)
def test_an_epoch_is_what_a_longer_store_has_after_the_store(
  texts, tmp_path, changes
):
  opened = streams.harvested(texts, tmp_path / 'store', **changes)
  want_RD = _rest(texts, tmp_path, opened, **changes)
  # The window in which the text ends has its beginning too.
  (got_RD,) = streams.batches(
    streams.feed(opened, batch=2 * len(want_RD)), 0, 1
  )

  def farthest(rows_RD, from_RD, reduce=np.max):
    nearest_R, _ = spatial.KDTree(from_RD).query(rows_RD, p=np.inf)
    return reduce(nearest_R)

  atol = 0.05 if opened.manifest.dtype == 'bfloat16' else 1e-5
  assert max(farthest(want_RD, got_RD), farthest(got_RD, want_RD)) < atol
  # Control: the rows of the store are others.
  stored_RD = opened.read_rows(0, opened.manifest.n_rows)
  assert farthest(stored_RD, got_RD, np.median) > 0.1


def test_the_order_is_that_of_the_windows(texts, tmp_path, opened):
  want_RD = _rest(texts, tmp_path, opened)
  feed = streams.feed(opened, batch=4)
  windows = list(_windows(feed, 2))
  got_RD = np.concatenate(streams.batches(feed, 0, sum(windows) // 4))
  first = 0
  for number, n_rows in enumerate(windows):
    rows = first + order.mixing(3, number, n_rows)
    window_RD = got_RD[first : first + n_rows]
    np.testing.assert_allclose(
      window_RD, want_RD[rows][: len(window_RD)], atol=1e-5
    )
    first += n_rows


def _windows(feed, count):
  """Rows of the first windows."""
  starts = []
  for step, _ in enumerate(feed.iterate(0), 1):
    cursor = feed.cursor(step)
    if cursor['rows'] not in starts:
      starts.append(cursor['rows'])
    if len(starts) > count:
      break
  return np.diff(starts)


@pytest.mark.parametrize(
  ('batch', 'changes'),
  [(30, {}), (50, {'pack': True, 'bos': 'a'}), (300, {})],
)
def test_it_goes_on_from_a_cursor_to_the_bit(texts, tmp_path, batch, changes):
  """Through windows, batches larger than one, and the text's end."""
  opened = streams.harvested(texts, tmp_path / 'store', **changes)
  steps = 3900 // batch
  feed, cursors = streams.feed(opened, batch=batch), {}
  whole = []
  for step, batch_BD in enumerate(feed.iterate(0, steps), 1):
    whole.append(np.asarray(batch_BD))
    cursors[step] = json.loads(json.dumps(feed.cursor(step)))
  assert len({cursor['window'] for cursor in cursors.values()}) > 2
  for step in {1, steps // 3, steps - 1}:
    rest = streams.batches(
      streams.feed(opened, cursors[step], batch=batch), step, steps
    )
    runs.assert_same_bits(rest, whole[step:])
    # Control: another window's cursor gives other rows.
    wrong = cursors[step] | {'window': cursors[step]['window'] + 1}
    other = streams.batches(
      streams.feed(opened, wrong, batch=batch), step, step + 1
    )
    assert not np.array_equal(other[0], whole[step])


def test_no_document_of_the_store_comes_and_the_text_begins_again(
  opened, monkeypatch
):
  seen, whole = [], device_window.DeviceWindow.append

  def append(self, pool):
    seen.extend(pool)
    whole(self, pool)

  monkeypatch.setattr(device_window.DeviceWindow, 'append', append)
  streams.batches(streams.feed(opened), 0, 400)
  documents = np.concatenate([context.documents for context in seen])
  last = opened.documents()[-1]
  assert documents.min() == last + 1
  assert set(documents) == set(range(last + 1, documents.max() + 1))
  assert np.sum(np.diff(documents) < 0) >= 2


def test_seeds_mix_otherwise(opened):
  first, second = (
    np.concatenate(streams.batches(streams.feed(opened, seed=s), 0, 2))
    for s in (0, 1)
  )
  assert np.mean(np.abs(first - second) > 1e-4) > 0.9


def test_a_sweep_goes_on_from_the_run_that_did_least(
  opened, tmp_path, monkeypatch
):
  subject = toy.subject()
  monkeypatch.setattr(subject_lib, 'load_recorded', lambda *args: subject)
  config = planted.train_config(
    sae=autoencoder.SaeConfig(d_model=16, n_latents=64, k=4),
    stream=True, batch_size=32, eval_rows=24,
  )  # fmt: skip
  # Runs that differ only in the rate are of one compiled step.
  alone, both = (
    train.sweep(config, str(tmp_path / name), learning_rate=[1e-3, 3e-3])
    for name in ('alone', 'both')
  )
  for workdir, member in alone.items():
    train.train(member, opened.url, workdir)
  for (workdir, member), step in zip(both.items(), (25, 14)):
    streams.break_off(step, member, workdir, opened.url)
  assert [runs.saved_steps(w)[-1] for w in both] == [20, 10]
  train.train_many(both, opened.url)
  for got, want in zip(both, alone):
    runs.assert_same_run(got, want)
  # Control: they are different runs.
  assert len({runs.log(workdir) for workdir in alone}) == 2


@pytest.mark.parametrize('change', ['other text', 'shorter text'])
def test_a_text_that_changed_is_refused(texts, opened, change):
  feed = streams.feed(opened)
  for step, _ in enumerate(feed.iterate(0, 60), 1):
    cursor = feed.cursor(step)
  lines = texts.read_text()
  if change == 'other text':
    texts.write_text(lines.replace('a', 'b'))
  else:
    texts.write_text('\n'.join(lines.splitlines()[:2]))
  with pytest.raises(errors.UserError, match='is not what this run began'):
    streams.batches(streams.feed(opened, cursor), 60, 61)
  # Control: the text brought back is taken.
  texts.write_text(lines)
  assert len(streams.batches(streams.feed(opened, cursor), 60, 61)) == 1


def test_windows_have_the_rows_asked_for(opened):
  """Of contexts that are not full; pools of 32 contexts have 500 rows."""
  for chunks in (8, 32):
    windows = _windows(streams.feed(opened, chunks=chunks), 2)
    assert all(chunks * 32 - 300 < rows < chunks * 32 + 600 for rows in windows)


def test_closing_does_not_wait_for_the_text_to_be_read(
  texts, opened, monkeypatch
):
  feed = streams.feed(opened)
  whole, taken = from_text.source.documents, []
  allowed = threading.Semaphore(0)

  def one_by_one(config):
    for document in whole(config):
      allowed.acquire()
      taken.append(document)
      yield document

  monkeypatch.setattr(from_text.source, 'documents', one_by_one)
  batches = feed.iterate(0)
  consumer = threading.Thread(target=lambda: next(batches, None), daemon=True)
  closed = []
  iterate = from_text.ahead.iterate
  monkeypatch.setattr(
    from_text.ahead,
    'iterate',
    lambda *args: closed.append(args[-1]) or iterate(*args),
  )
  consumer.start()
  allowed.release()
  while not taken:
    time.sleep(0.01)
  (reader,) = [t for t in threading.enumerate() if t.name == 'text feed']
  closed[0].set()
  # There are eighty documents.
  allowed.release(1000)
  reader.join(60)
  assert not reader.is_alive()
  assert len(taken) < 40


def test_a_mask_that_leaves_nothing_is_refused(opened, monkeypatch):
  mask = Mask(median_norm=(1.0,), norm_limit=(0.0,))
  with monkeypatch.context() as patch:
    patch.setattr(from_text, '_mask', lambda _: mask)
    with pytest.raises(errors.UserError, match='leaves no token of a window'):
      streams.batches(streams.feed(opened), 0, 1)
  # One that is not the store's is not read, however it came there.
  path = pathlib.Path(opened.url, 'mask.json')
  median = 2 * layout.read_mask(opened.url, opened.manifest).median_norm[0]
  path.write_bytes(signed.to_file(manifest.make_mask([median], 2.0)))
  with pytest.raises(errors.UserError, match=r'mask\.json in .* the manifest'):
    streams.feed(opened)


def test_a_stream_says_that_activations_are_not_finite(
  opened, caplog, monkeypatch
):
  whole = toy.subject()
  bad = whole.tokenizer.encode('1').ids[0]
  params = whole.params | {'embed': whole.params['embed'].at[bad].set(np.nan)}
  broken = dataclasses.replace(whole, params=params)
  monkeypatch.setattr(toy, 'subject', lambda: broken)
  batches = streams.batches(streams.feed(opened), 0, 9)
  assert all(np.isfinite(batch).all() for batch in batches)
  said = re.findall(r'of \d+ tokens of window \d+ .* not fin', caplog.text)
  assert len(said) == 1
