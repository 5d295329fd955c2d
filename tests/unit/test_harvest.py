"""Harvest: rows against the subject run alone, masks, split, restarts."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from sae_jax import errors, store
from sae_jax.harvesting import harvest
from sae_jax.storage import claim
from sae_jax.store import layout
from sae_jax.store import writer as writer_lib
from sae_jax.text import corpus
from tests.support import toy


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_rows_are_the_subject_s_activations(texts, tmp_path, dtype):
  config = toy.config(texts, dtype=dtype)
  manifest = toy.run(config, tmp_path / 'store')
  opened = store.open_store(str(tmp_path / 'store'))
  assert opened.manifest == manifest
  contexts = toy.expected_contexts(config)
  assert len(contexts) > 100
  np.testing.assert_array_equal(
    opened.tokens(), np.concatenate([tokens for _, tokens in contexts])
  )
  np.testing.assert_array_equal(
    opened.documents(), np.concatenate([[d] * len(t) for d, t in contexts])
  )
  positions = np.concatenate([np.arange(len(t)) for _, t in contexts])
  np.testing.assert_array_equal(opened.positions(), positions)
  np.testing.assert_array_equal(
    opened.stream_index(), np.flatnonzero(positions)
  )
  expected = np.concatenate([toy.resid(tokens)[1:] for _, tokens in contexts])
  rows = opened.read_rows(0, manifest.n_rows)
  tolerance = 1e-5 if dtype == 'float32' else 2**-8
  np.testing.assert_allclose(rows, expected, tolerance, 10 * tolerance)
  # A context that ran under another's tokens, or one row off, would show.
  assert np.abs(np.roll(expected, 1, 0) - rows).mean() > 0.1
  assert (manifest.weights_sha256, manifest.d_model) == ('cafe', 16)
  assert manifest.source_rows == {str(texts): manifest.n_rows}


def test_documents_give_no_more_contexts_than_allowed(texts, tmp_path):
  toy.run(toy.config(texts), tmp_path / 'three')
  toy.run(toy.config(texts, max_contexts_per_document=1), tmp_path / 'one')
  for name, most in (('three', 3), ('one', 1)):
    opened = store.open_store(str(tmp_path / name))
    starts = opened.documents()[opened.positions() == 0]
    assert np.bincount(starts).max() == most


@pytest.mark.parametrize('n_tokens', [1, 100, 700])
def test_the_tokens_wanted(texts, tmp_path, n_tokens):
  manifest = toy.run(
    toy.config(texts, n_tokens=n_tokens, holdout_fraction=0.0),
    tmp_path / 'store',
  )
  assert n_tokens <= manifest.n_rows < n_tokens + 19
  assert manifest.holdout_rows == 0
  # A smaller harvest is the start of a larger one.
  whole = toy.run(toy.config(texts), tmp_path / 'whole')
  assert whole.n_rows > 2000
  part, all_of_it = (
    store.open_store(str(tmp_path / name)) for name in ('store', 'whole')
  )
  np.testing.assert_array_equal(
    part.tokens(), all_of_it.tokens()[: manifest.n_stream]
  )


def test_short_sources_give_what_they_have(texts, tmp_path, caplog):
  manifest = toy.run(toy.config(texts), tmp_path / 'store')
  assert f'gave {manifest.n_rows} of 1000000 tokens' in caplog.text


def _split(url):
  opened = store.open_store(str(url))
  documents = opened.documents()[opened.stream_index()]
  return documents[: opened.n_train], documents[opened.n_train :]


@pytest.mark.parametrize('fraction', [0.01, 0.1, 0.5])
def test_the_split_is_at_a_document_s_border(texts, tmp_path, fraction):
  config = toy.config(texts, holdout_fraction=fraction)
  manifest = toy.run(config, tmp_path / 'store')
  train, held = _split(tmp_path / 'store')
  assert not set(train) & set(held)
  # A document less would be too few rows, or one document alone.
  first = (held == held[0]).sum()
  if len(set(held)) > 2:
    assert len(held) - first < fraction * manifest.n_rows
  assert fraction * manifest.n_rows <= len(held)
  assert 0 < manifest.holdout_rows == len(held)
  assert len(set(held)) >= 2


def test_a_split_by_rows_alone_would_share_a_document(texts, tmp_path):
  toy.run(toy.config(texts), tmp_path / 'store')
  documents = np.concatenate(_split(tmp_path / 'store'))
  shared = [
    documents[cut - 1] == documents[cut] for cut in range(1, len(documents))
  ]
  assert np.mean(shared) > 0.9


@pytest.mark.parametrize('n_documents', [1, 2])
def test_fewer_than_three_documents_cannot_be_split(tmp_path, n_documents):
  path, lines = tmp_path / 'few.jsonl', ['one document', 'the other', 'a third']
  texts = [json.dumps({'text': line}) + '\n' for line in lines]
  path.write_text(''.join(texts[:n_documents]))
  with pytest.raises(
    errors.UserError,
    match=f'{n_documents} documents cannot be split into training, validation '
    r'and test with holdout_fraction 0\.1: .* 3 at the least',
  ):
    toy.run(toy.config(path), tmp_path / 'store')
  assert toy.run(
    toy.config(path, holdout_fraction=0.0), tmp_path / 'store'
  ).n_rows
  # Control: three are enough.
  path.write_text(''.join(texts))
  toy.run(toy.config(path), tmp_path / 'three')
  opened = store.open_store(str(tmp_path / 'three'))
  splits = range(opened.n_train), opened.validation_rows, opened.test_rows
  assert all(splits)


def test_a_killed_harvest_goes_on(texts, tmp_path, monkeypatch):
  url = str(tmp_path / 'store')
  finish = writer_lib.ShardWriter.finish

  def killed(self, *args):
    if self.number == 2:
      raise RuntimeError('killed')
    return finish(self, *args)

  with monkeypatch.context() as patch:
    patch.setattr(writer_lib.ShardWriter, 'finish', killed)
    with pytest.raises(RuntimeError, match='killed'):
      toy.run(toy.config(texts), url)
  assert len(list((tmp_path / 'store' / 'shards').iterdir())) == 2
  with pytest.raises(errors.UserError, match='not a finished store'):
    store.open_store(url)
  some = store.open_store(url, unsealed=True)
  first = some.read_rows(0, some.manifest.n_rows)
  made = []
  with monkeypatch.context() as patch:
    patch.setattr(
      writer_lib.ShardWriter,
      'finish',
      lambda self, *args: made.append(self.number) or finish(self, *args),
    )
    again = toy.run(toy.config(texts), url)
  clean = toy.run(toy.config(texts), tmp_path / 'clean')
  assert again == clean
  for path in (tmp_path / 'clean').rglob('*'):
    if path.is_file():
      twin = tmp_path / 'store' / path.relative_to(tmp_path / 'clean')
      assert twin.read_bytes() == path.read_bytes()
  whole = store.open_store(url)
  whole.verify()
  np.testing.assert_array_equal(whole.read_rows(0, len(first)), first)
  # What was there is not made again.
  assert made == list(range(2, len(whole.manifest.shard_counts)))


def test_a_finished_store_is_left_alone(texts, tmp_path, caplog):
  caplog.set_level('INFO', 'absl')
  url = str(tmp_path / 'store')
  first = toy.run(toy.config(texts), url)
  # Without a subject: had it run, 'toy' could not have been loaded.
  assert harvest.harvest(toy.config(texts), url) == first
  assert 'nothing to do' in caplog.text
  with pytest.raises(errors.UserError, match=r'\(seed: 0 -> 1\)'):
    toy.run(toy.config(texts, seed=1), url)
  other = dataclasses.replace(toy.subject(), weights_sha256='beef')
  with pytest.raises(errors.UserError, match='toy is not the model store'):
    harvest.harvest(toy.config(texts), url, other)
  assert layout.read_manifest(url) == first


def test_seeds_and_configs_change_the_identity(texts, tmp_path):
  changes = [{}, {'seed': 1}, {'dtype': 'bfloat16'}, {'mask_first': False}]
  identities = {
    toy.run(toy.config(texts, **change), tmp_path / str(i)).identity
    for i, change in enumerate(changes)
  }
  assert len(identities) == len(changes)
  assert toy.run(toy.config(texts), tmp_path / 'again').identity in identities


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'n_tokens': 0}, 'n_tokens 0 must be 1 or more'),
    ({'batch_contexts': -1}, 'batch_contexts -1'),
    ({'holdout_fraction': 1.0}, r'holdout_fraction 1\.0'),
    (
      {'shard_rows': 18},
      r'gives up to 19 rows, a shard takes 18: use a larger',
    ),
    (
      {'sites': (str(toy.SITE), 'blocks.1.hook_resid_post')},
      'name one twice',
    ),
    ({'mask_norm_multiple': 0.5}, r'mask_norm_multiple 0\.5 must be above 1'),
    ({'mask_norm_multiple': float('nan')}, 'mask_norm_multiple nan'),
    ({'min_context_tokens': 21}, 'is above context_length 20'),
    ({'dtype': 'float16'}, "dtype 'float16' is not known"),
    ({'sites': ('blocks.9.resid_post',)}, 'beyond the last block'),
    ({'sites': ('blocks.1.mlp',)}, 'is not known: use blocks.N'),
    ({'subject': 'other'}, 'the subject given is toy'),
    ({'shard_rows': 33}, 'shard_rows 33 must be a multiple'),
    ({'bos': '<s>'}, "bos '<s>' is no token"),
    ({'sources': ('nowhere.txt',)}, 'nowhere.txt does not exist'),
  ],
)
def test_configs_that_cannot_be_met(texts, tmp_path, change, message):
  url = tmp_path / 'store'
  with pytest.raises(errors.UserError, match=message):
    toy.run(toy.config(texts, **change), url)
  assert not url.exists()


def test_several_sites_are_read_in_one_pass(texts, tmp_path):
  sites = (str(toy.SITE), 'blocks.0.mlp_out')
  both = toy.run(toy.config(texts, sites=sites), tmp_path / 'both')
  for site in sites:
    toy.run(toy.config(texts, sites=(site,)), tmp_path / site)
    alone = store.open_store(str(tmp_path / site))
    rows = store.open_store(str(tmp_path / 'both'), site).read_rows(
      0, both.n_rows
    )
    np.testing.assert_array_equal(rows, alone.read_rows(0, both.n_rows))
  with pytest.raises(errors.UserError, match='name one of them'):
    store.open_store(str(tmp_path / 'both'))


@pytest.mark.parametrize('count', [2, 3])
def test_processes_share_a_harvest(texts, tmp_path, count):
  url, config = str(tmp_path / 'store'), toy.config(texts)
  for index in range(count - 1):
    assert harvest.harvest(config, url, toy.subject(), (index, count)) is None
    with pytest.raises(errors.UserError, match='not a finished store'):
      store.open_store(url)
  shared = harvest.harvest(config, url, toy.subject(), (count - 1, count))
  assert shared == toy.run(config, tmp_path / 'alone')
  store.open_store(url).verify()
  with pytest.raises(errors.UserError, match='process_index 3'):
    harvest.harvest(config, url, toy.subject(), (3, 3))


def test_a_second_harvest_of_a_folder_is_refused(texts, tmp_path):
  url, config = str(tmp_path / 'store'), toy.config(texts)
  with claim.claim(url):
    for process in ((0, 1), (1, 2)):
      with pytest.raises(errors.UserError, match=r'store is in use by another'):
        harvest.harvest(config, url, toy.subject(), process)
  # Processes that share a harvest do not refuse each other.
  with claim.claim(url, shared=True):
    assert harvest.harvest(config, url, toy.subject(), (0, 2)) is None
    with pytest.raises(errors.UserError, match=r'store is in use by another'):
      toy.run(config, url)
  toy.run(config, url)
  # A finished store is used by nobody.
  with claim.claim(url):
    toy.run(config, url)


def test_the_manifest_says_which_text_and_tokenizer(texts, tmp_path):
  config = toy.config(texts, n_tokens=200)
  manifest = toy.run(config, tmp_path / 'store')
  lines = f'{texts.stat().st_size}  texts.jsonl\n'
  digest = hashlib.sha256(lines.encode()).hexdigest()
  assert manifest.corpus == {str(texts): digest}
  tokenizer = toy.subject().tokenizer
  assert manifest.tokenizer_sha256 == (
    hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
  )
  # More of another text would be no more of this one.
  texts.write_text(texts.read_text() + json.dumps({'text': 'more'}) + '\n')
  more = dataclasses.replace(config, n_tokens=400)
  with pytest.raises(errors.UserError, match=r'another plan .*corpus'):
    toy.run(more, tmp_path / 'store')


def test_more_tokens_are_appended_as_a_version(texts, tmp_path):
  url = str(tmp_path / 'store')
  first = toy.run(toy.config(texts, n_tokens=500), url)
  rows = store.open_store(url).read_rows(0, first.n_rows)
  second = toy.run(toy.config(texts, n_tokens=900), url)
  assert (first.version, second.version) == (1, 2)
  assert 500 <= first.n_rows < 520 and 900 <= second.n_rows < 920
  np.testing.assert_array_equal(
    store.open_store(url).read_rows(0, first.n_rows), rows
  )
  old = store.open_store(url, version=1)
  assert old.manifest == first
  old.verify()
  whole = toy.run(toy.config(texts, n_tokens=900), tmp_path / 'whole')
  # The same rows; shards are cut where the first version ended.
  np.testing.assert_array_equal(
    store.open_store(str(tmp_path / 'whole')).read_rows(0, whole.n_rows),
    store.open_store(url).read_rows(0, second.n_rows),
  )
  assert whole.identity != second.identity
  with pytest.raises(errors.UserError, match='n_tokens: 900 -> 500'):
    toy.run(toy.config(texts, n_tokens=500), url)


@pytest.mark.parametrize('bos', ['', '!'])
def test_packed_contexts_hold_several_documents(texts, tmp_path, bos):
  config = toy.config(texts, pack=True, bos=bos, min_context_tokens=1)
  manifest = toy.run(config, tmp_path / 'store')
  opened = store.open_store(str(tmp_path / 'store'))
  subject, want, numbers = toy.subject(), [], []
  first = [subject.tokenizer.token_to_id(bos)] if bos else []
  for document in corpus.documents(config.sources, config.seed, 3 * 20 * 4):
    ids = subject.tokenizer.encode(document.text).ids[: 3 * (20 - len(first))]
    while ids:
      # At the document's beginning, and at that of a context.
      piece = [*first, *ids][: 20 - len(want) % 20]
      ids = ids[len(piece) - len(first) :]
      want += piece
      numbers += [document.number] * len(piece)
  np.testing.assert_array_equal(opened.tokens(), want)
  np.testing.assert_array_equal(
    opened.documents(), np.unique(numbers, return_inverse=True)[1]
  )
  positions = np.arange(len(want)) % 20
  np.testing.assert_array_equal(opened.positions(), positions)
  rows = opened.read_rows(0, manifest.n_rows)
  contexts = [want[i : i + 20] for i in range(0, len(want), 20)]
  expected = np.concatenate([toy.resid(tokens)[1:] for tokens in contexts])
  np.testing.assert_allclose(rows, expected, 1e-5, 1e-4)
  assert sum(manifest.source_rows.values()) == manifest.n_rows == len(rows)
  # The split is within a context: no document is on both sides.
  documents = opened.documents()[opened.stream_index()]
  held = documents[opened.n_train :]
  assert held[0] > documents[opened.n_train - 1]
  # So is that of validation and test, whose contexts begin after it.
  test = documents[opened.test_rows.start :]
  assert test[0] > documents[opened.validation_rows[-1]]
  within = store.test_contexts(opened, 10**6)
  assert set(within.document_C) <= set(test)
  starts = np.flatnonzero(positions == 0)
  whole = [s for s in starts if opened.documents()[s] >= test[0]]
  assert len(within.tokens_CT) == len(whole) > 0
  # Control: without packing it is another stream.
  assert len(want) > len(toy.expected_contexts(config)) * 10


def test_a_site_of_another_width_is_refused(texts, tmp_path):
  with pytest.raises(errors.UserError, match=r'is 32 wide, .* is 16'):
    toy.run(
      toy.config(texts, sites=(str(toy.SITE), 'blocks.0.mlp_act')),
      tmp_path / 'store',
    )


def test_texts_that_are_all_too_short(tmp_path):
  path = tmp_path / 'short.jsonl'
  path.write_text(json.dumps({'text': 'abc'}))
  with pytest.raises(errors.UserError, match='min_context_tokens below 4'):
    toy.run(toy.config(path), tmp_path / 'store')
