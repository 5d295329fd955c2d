"""Harvest: rows against the subject run alone, masks, split, restarts."""

import dataclasses
import functools
import hashlib
import json
import re

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from sae_jax import config as config_lib
from sae_jax import subject as subject_lib
from sae_jax.activations import corpus, harvest, layout, pools, store
from sae_jax.activations import writer as writer_lib
from sae_jax.subject import capture, transformer
from tests import fake_gcs, gcs_clients, gcs_faults

SITE = capture.Site(1, 'resid_post')
LOUD = ord('~')  # A token whose embedding is scaled up: an attention sink.


@functools.cache
def _subject():
  """A random model of bytes."""
  config = transformer.TransformerConfig(
    n_layers=3,
    d_model=16,
    n_heads=2,
    n_kv_heads=1,
    d_head=8,
    d_ff=32,
    vocab_size=256,
    rope_base=1e4,
    norm_eps=1e-5,
    rope_pairs='interleaved',
  )
  params = transformer.init(config, jax.random.key(0))
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {text: i for i, text in enumerate(alphabet)}
  loud = vocabulary[chr(LOUD)]
  params['embed'] = params['embed'].at[loud].multiply(1000)
  tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  return subject_lib.Subject('toy', config, params, tokenizer, 'cafe')


def _config(path, **changes):
  return harvest.HarvestConfig(
    **{
      'subject': 'toy',
      'sites': (str(SITE),),
      'sources': (str(path),),
      'n_tokens': 10**6,
      'context_length': 20,
      'max_contexts_per_document': 3,
      'min_context_tokens': 4,
      'batch_contexts': 4,
      'chunk_rows': 32,
      'shard_rows': 64,
      'mask_norm_multiple': 0.0,
      'mesh_data': 1,
    }
    | changes
  )


def write_texts(folder):
  """Eighty documents of 1 to 150 characters; some are cut, some skipped."""
  rng = np.random.default_rng(0)
  letters = np.array(list('abcdefgh .,\n'))
  path = folder / 'texts.jsonl'
  lines = [
    f'{i} ' + ''.join(rng.choice(letters, rng.integers(1, 150)))
    for i in range(80)
  ]
  path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in lines))
  return path


@pytest.fixture
def texts(tmp_path):
  return write_texts(tmp_path)


def _run(config, url):
  return harvest.harvest(config, str(url), _subject())


def _expected_contexts(config):
  """(document, tokens) of every context, from the definition."""
  contexts, number = [], 0
  for document in corpus.documents(config.sources, config.seed, 3 * 20 * 4):
    ids = _subject().tokenizer.encode(document.text).ids
    pieces = [ids[:20], ids[20:40], ids[40:60]]
    pieces = [piece for piece in pieces if len(piece) >= 4]
    contexts += [(number, piece) for piece in pieces]
    number += bool(pieces)
  return contexts


def _resid(tokens):
  """Activations of one context on its own, unpadded."""
  subject = _subject()
  # Padded on the right to one shape: causal attention does not see it.
  tokens_BT = np.full((1, 20), 7)
  tokens_BT[0, : len(tokens)] = tokens
  run = jax.jit(capture.capture, static_argnames=('config', 'site'))
  return np.asarray(run(subject.config, subject.params, tokens_BT, SITE))[
    0, : len(tokens)
  ]


@pytest.mark.fast
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_rows_are_the_subject_s_activations(texts, tmp_path, dtype):
  config = _config(texts, dtype=dtype)
  manifest = _run(config, tmp_path / 'store')
  opened = store.open_store(str(tmp_path / 'store'))
  assert opened.manifest == manifest
  contexts = _expected_contexts(config)
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
  expected = np.concatenate([_resid(tokens)[1:] for _, tokens in contexts])
  rows = opened.read_rows(0, manifest.n_rows)
  tolerance = 1e-5 if dtype == 'float32' else 2**-8
  np.testing.assert_allclose(rows, expected, tolerance, 10 * tolerance)
  # A context that ran under another's tokens, or one row off, would show.
  assert np.abs(np.roll(expected, 1, 0) - rows).mean() > 0.1
  assert (manifest.weights_sha256, manifest.d_model) == ('cafe', 16)
  assert manifest.source_rows == {str(texts): manifest.n_rows}


@pytest.mark.fast
def test_documents_give_no_more_contexts_than_allowed(texts, tmp_path):
  _run(_config(texts), tmp_path / 'three')
  _run(_config(texts, max_contexts_per_document=1), tmp_path / 'one')
  for name, most in (('three', 3), ('one', 1)):
    opened = store.open_store(str(tmp_path / name))
    starts = opened.documents()[opened.positions() == 0]
    assert np.bincount(starts).max() == most


@pytest.mark.fast
@pytest.mark.parametrize('n_tokens', [1, 100, 700])
def test_the_tokens_wanted(texts, tmp_path, n_tokens):
  manifest = _run(
    _config(texts, n_tokens=n_tokens, holdout_fraction=0.0), tmp_path / 'store'
  )
  assert n_tokens <= manifest.n_rows < n_tokens + 19
  assert manifest.holdout_rows == 0
  # A smaller harvest is the start of a larger one.
  whole = _run(_config(texts), tmp_path / 'whole')
  assert whole.n_rows > 2000
  part, all_of_it = (
    store.open_store(str(tmp_path / name)) for name in ('store', 'whole')
  )
  np.testing.assert_array_equal(
    part.tokens(), all_of_it.tokens()[: manifest.n_stream]
  )


@pytest.mark.fast
def test_short_sources_give_what_they_have(texts, tmp_path, caplog):
  manifest = _run(_config(texts), tmp_path / 'store')
  assert f'gave {manifest.n_rows} of 1000000 tokens' in caplog.text


@pytest.mark.fast
def test_loud_tokens_are_masked_and_counted(tmp_path, caplog):
  path = tmp_path / 'loud.jsonl'
  lines = [f'{i:02} abc~defgh ijk' for i in range(40)]
  path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in lines))
  loud = _subject().tokenizer.encode('~').ids[0]
  masked = _run(_config(path, mask_norm_multiple=10.0), tmp_path / 'masked')
  opened = store.open_store(str(tmp_path / 'masked'))
  stream = opened.tokens()
  assert (stream == loud).sum() == 40
  kept = np.zeros(len(stream), bool)
  kept[opened.stream_index()] = True
  np.testing.assert_array_equal(
    kept, (stream != loud) & (opened.positions() > 0)
  )
  assert masked.mask['masked_first'] == 40
  assert masked.mask['masked_norm'] == 40
  norms = np.linalg.norm(opened.read_rows(0, masked.n_rows), axis=1)
  assert norms.max() <= 10 * masked.mask['median_norm'][str(SITE)]
  assert 'attention sinks' not in caplog.text
  # Without the rules these rows are there, and loud.
  config = _config(path, mask_norm_multiple=0.0, mask_first=False)
  everything = _run(config, tmp_path / 'all')
  opened = store.open_store(str(tmp_path / 'all'))
  assert everything.n_rows == everything.n_stream == len(stream)
  norms = np.linalg.norm(opened.read_rows(0, len(stream)), axis=1)
  assert (norms > 10 * masked.mask['median_norm'][str(SITE)]).sum() == 40
  assert everything.mask['masked_norm'] == 0
  told = r'32 of the first 512 tokens at .* more than 10 times the median'
  assert re.search(told, caplog.text)


@pytest.mark.fast
def test_the_median_is_that_of_the_first_contexts(texts, tmp_path):
  config = _config(texts, mask_norm_multiple=2.0)
  manifest = _run(config, tmp_path / 'store')
  pool = [_resid(tokens)[1:] for _, tokens in _expected_contexts(config)[:32]]
  norms = np.linalg.norm(np.concatenate(pool).astype(np.float64), axis=1)
  np.testing.assert_allclose(
    manifest.mask['median_norm'][config.sites[0]], np.median(norms), rtol=1e-5
  )


@pytest.mark.fast
def test_no_context_is_read_twice(texts, tmp_path, monkeypatch):
  """The pool that the mask is fitted to is stored, unless it was before."""
  seen, run = [], pools._residuals

  def counted(config, params, tokens_BT, *rest):
    seen.append(np.asarray(tokens_BT))
    return run(config, params, tokens_BT, *rest)

  monkeypatch.setattr(pools, '_residuals', counted)
  config = _config(texts, shard_rows=4096, mask_norm_multiple=10.0)
  _run(config, tmp_path / 'store')
  read = [row for tokens in seen for row in tokens if row.any()]
  want = _expected_contexts(config)
  assert len(read) == len(want)
  # Control: shards that end before the pool does have pools of their own.
  seen.clear()
  _run(_config(texts, mask_norm_multiple=10.0), tmp_path / 'small')
  again = [row for tokens in seen for row in tokens if row.any()]
  assert len(again) > len(want)


def test_activations_that_are_not_finite_are_masked(texts, tmp_path):
  subject = _subject()
  params = dict(subject.params)
  bad = subject.tokenizer.encode('1').ids[0]
  params['embed'] = params['embed'].at[bad].set(np.nan)
  broken = dataclasses.replace(subject, params=params)
  config = _config(texts)
  manifest = harvest.harvest(config, str(tmp_path / 'store'), broken)
  opened = store.open_store(str(tmp_path / 'store'))
  rows = opened.read_rows(0, manifest.n_rows)
  assert np.isfinite(rows).all()
  assert manifest.mask['masked_norm'] > 0
  params['embed'] = params['embed'].at[:].set(np.nan)
  with pytest.raises(config_lib.UserError, match='is finite'):
    harvest.harvest(config, str(tmp_path / 'nan'), broken)


def _split(url):
  opened = store.open_store(str(url))
  documents = opened.documents()[opened.stream_index()]
  return documents[: opened.n_train], documents[opened.n_train :]


@pytest.mark.fast
@pytest.mark.parametrize('fraction', [0.01, 0.1, 0.5])
def test_the_split_is_at_a_document_s_border(texts, tmp_path, fraction):
  config = _config(texts, holdout_fraction=fraction)
  manifest = _run(config, tmp_path / 'store')
  train, held = _split(tmp_path / 'store')
  assert not set(train) & set(held)
  # A document less would be too few rows.
  first = (held == held[0]).sum()
  assert len(held) - first < fraction * manifest.n_rows <= len(held)
  assert 0 < manifest.holdout_rows == len(held)


@pytest.mark.fast
def test_a_split_by_rows_alone_would_share_a_document(texts, tmp_path):
  _run(_config(texts), tmp_path / 'store')
  documents = np.concatenate(_split(tmp_path / 'store'))
  shared = [
    documents[cut - 1] == documents[cut] for cut in range(1, len(documents))
  ]
  assert np.mean(shared) > 0.9


@pytest.mark.fast
def test_one_document_cannot_be_split(tmp_path):
  path = tmp_path / 'one.jsonl'
  path.write_text(json.dumps({'text': 'one document alone'}))
  with pytest.raises(config_lib.UserError, match='1 documents cannot be split'):
    _run(_config(path), tmp_path / 'store')
  assert _run(_config(path, holdout_fraction=0.0), tmp_path / 'store').n_rows


@pytest.mark.fast
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
      _run(_config(texts), url)
  assert len(list((tmp_path / 'store' / 'shards').iterdir())) == 2
  with pytest.raises(config_lib.UserError, match='not a finished store'):
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
    again = _run(_config(texts), url)
  clean = _run(_config(texts), tmp_path / 'clean')
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


@pytest.mark.fast
def test_a_finished_store_is_left_alone(texts, tmp_path, caplog):
  caplog.set_level('INFO')
  url = str(tmp_path / 'store')
  first = _run(_config(texts), url)
  # Without a subject: had it run, 'toy' could not have been loaded.
  assert harvest.harvest(_config(texts), url) == first
  assert 'nothing to do' in caplog.text
  with pytest.raises(config_lib.UserError, match=r'\(seed: 0 -> 1\)'):
    _run(_config(texts, seed=1), url)
  other = dataclasses.replace(_subject(), weights_sha256='beef')
  with pytest.raises(config_lib.UserError, match='weights_sha256: cafe -> b'):
    harvest.harvest(_config(texts), url, other)
  assert layout.read_manifest(url) == first


@pytest.mark.fast
def test_seeds_and_configs_change_the_identity(texts, tmp_path):
  changes = [{}, {'seed': 1}, {'dtype': 'bfloat16'}, {'mask_first': False}]
  identities = {
    _run(_config(texts, **change), tmp_path / str(i)).identity
    for i, change in enumerate(changes)
  }
  assert len(identities) == len(changes)
  assert _run(_config(texts), tmp_path / 'again').identity in identities


@pytest.mark.fast
@pytest.mark.parametrize('rate', [0.0, 0.1])
def test_a_bucket_gets_the_same_store(texts, tmp_path, monkeypatch, rate):
  local = layout.kvstore

  def quick(url):
    spec = local(url)
    if spec['driver'] == 'gcs':
      spec |= gcs_clients.QUICK_RETRIES
    return spec

  monkeypatch.setattr(layout, 'kvstore', quick)
  server = fake_gcs.FakeGcs(['bucket'], gcs_faults.Faults(0, rate))
  with server as url:
    monkeypatch.setenv('TENSORSTORE_GCS_HTTP_URL', url)
    monkeypatch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'fake')
    remote = _run(_config(texts), 'gs://bucket/store')
    assert remote == _run(_config(texts), tmp_path / 'store')
    assert _run(_config(texts), 'gs://bucket/store') == remote
    server.reset_counts()
    opened = store.open_store('gs://bucket/store')
    opened.verify()
    print(server.table())
  if rate:
    assert sum(server.faults_met.values()) > 10
  # Every byte, lost answers or not.
  objects = server.objects['bucket']
  paths = [p for p in (tmp_path / 'store').rglob('*') if p.is_file()]
  assert len(objects) == len(paths)
  for path in paths:
    name = f'store/{path.relative_to(tmp_path / "store")}'
    assert objects[name].data == path.read_bytes()


@pytest.mark.fast
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
    ({'sites': (str(SITE), 'blocks.1.hook_resid_post')}, 'name one twice'),
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
  with pytest.raises(config_lib.UserError, match=message):
    _run(_config(texts, **change), url)
  assert not url.exists()


@pytest.mark.fast
def test_several_sites_are_read_in_one_pass(texts, tmp_path):
  sites = (str(SITE), 'blocks.0.mlp_out')
  both = _run(_config(texts, sites=sites), tmp_path / 'both')
  for site in sites:
    _run(_config(texts, sites=(site,)), tmp_path / site)
    alone = store.open_store(str(tmp_path / site))
    rows = store.open_store(str(tmp_path / 'both'), site).read_rows(
      0, both.n_rows
    )
    np.testing.assert_array_equal(rows, alone.read_rows(0, both.n_rows))
  with pytest.raises(config_lib.UserError, match='name one of them'):
    store.open_store(str(tmp_path / 'both'))


@pytest.mark.fast
@pytest.mark.parametrize('count', [2, 3])
def test_processes_share_a_harvest(texts, tmp_path, count):
  url, config = str(tmp_path / 'store'), _config(texts)
  for index in range(count - 1):
    assert harvest.harvest(config, url, _subject(), (index, count)) is None
    with pytest.raises(config_lib.UserError, match='not a finished store'):
      store.open_store(url)
  shared = harvest.harvest(config, url, _subject(), (count - 1, count))
  assert shared == _run(config, tmp_path / 'alone')
  store.open_store(url).verify()
  with pytest.raises(config_lib.UserError, match='process_index 3'):
    harvest.harvest(config, url, _subject(), (3, 3))


@pytest.mark.fast
def test_the_manifest_says_which_text_and_tokenizer(texts, tmp_path):
  config = _config(texts, n_tokens=200)
  manifest = _run(config, tmp_path / 'store')
  lines = f'{texts.stat().st_size}  texts.jsonl\n'
  digest = hashlib.sha256(lines.encode()).hexdigest()
  assert manifest.corpus == {str(texts): digest}
  tokenizer = _subject().tokenizer
  assert manifest.tokenizer_sha256 == (
    hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
  )
  # More of another text would be no more of this one.
  texts.write_text(texts.read_text() + json.dumps({'text': 'more'}) + '\n')
  more = dataclasses.replace(config, n_tokens=400)
  with pytest.raises(config_lib.UserError, match=r'another plan .*corpus'):
    _run(more, tmp_path / 'store')


@pytest.mark.fast
def test_more_tokens_are_appended_as_a_version(texts, tmp_path):
  url = str(tmp_path / 'store')
  first = _run(_config(texts, n_tokens=500), url)
  rows = store.open_store(url).read_rows(0, first.n_rows)
  second = _run(_config(texts, n_tokens=900), url)
  assert (first.version, second.version) == (1, 2)
  assert 500 <= first.n_rows < 520 and 900 <= second.n_rows < 920
  np.testing.assert_array_equal(
    store.open_store(url).read_rows(0, first.n_rows), rows
  )
  old = store.open_store(url, version=1)
  assert old.manifest == first
  old.verify()
  whole = _run(_config(texts, n_tokens=900), tmp_path / 'whole')
  # The same rows; shards are cut where the first version ended.
  np.testing.assert_array_equal(
    store.open_store(str(tmp_path / 'whole')).read_rows(0, whole.n_rows),
    store.open_store(url).read_rows(0, second.n_rows),
  )
  assert whole.identity != second.identity
  with pytest.raises(config_lib.UserError, match='n_tokens: 900 -> 500'):
    _run(_config(texts, n_tokens=500), url)


@pytest.mark.fast
@pytest.mark.parametrize('bos', ['', '!'])
def test_packed_contexts_hold_several_documents(texts, tmp_path, bos):
  config = _config(texts, pack=True, bos=bos, min_context_tokens=1)
  manifest = _run(config, tmp_path / 'store')
  opened = store.open_store(str(tmp_path / 'store'))
  subject, want, numbers = _subject(), [], []
  first = [subject.tokenizer.token_to_id(bos)] if bos else []
  for document in corpus.documents(config.sources, config.seed, 3 * 20 * 4):
    ids = (first + subject.tokenizer.encode(document.text).ids)[:60]
    want += ids
    numbers += [document.number] * len(ids)
  np.testing.assert_array_equal(opened.tokens(), want)
  np.testing.assert_array_equal(
    opened.documents(), np.unique(numbers, return_inverse=True)[1]
  )
  positions = np.arange(len(want)) % 20
  np.testing.assert_array_equal(opened.positions(), positions)
  rows = opened.read_rows(0, manifest.n_rows)
  contexts = [want[i : i + 20] for i in range(0, len(want), 20)]
  expected = np.concatenate([_resid(tokens)[1:] for tokens in contexts])
  np.testing.assert_allclose(rows, expected, 1e-5, 1e-4)
  assert sum(manifest.source_rows.values()) == manifest.n_rows == len(rows)
  # The split is within a context: no document is on both sides.
  documents = opened.documents()[opened.stream_index()]
  held = documents[opened.n_train :]
  assert held[0] > documents[opened.n_train - 1]
  # Control: without packing it is another stream.
  assert len(want) > len(_expected_contexts(config)) * 10


@pytest.mark.slow
def test_processes_that_tokenize_change_nothing(texts, tmp_path):
  here = _run(_config(texts), tmp_path / 'here')
  there = _run(_config(texts, tokenizer_workers=2), tmp_path / 'there')
  assert here == there
  assert _run(_config(texts, tokenizer_workers=1), tmp_path / 'there') == here


@pytest.mark.fast
def test_a_site_of_another_width_is_refused(texts, tmp_path):
  with pytest.raises(config_lib.UserError, match=r'is 32 wide, .* is 16'):
    _run(
      _config(texts, sites=(str(SITE), 'blocks.0.mlp_act')), tmp_path / 'store'
    )


@pytest.mark.fast
def test_texts_that_are_all_too_short(tmp_path):
  path = tmp_path / 'short.jsonl'
  path.write_text(json.dumps({'text': 'abc'}))
  with pytest.raises(config_lib.UserError, match='min_context_tokens below 4'):
    _run(_config(path), tmp_path / 'store')


@pytest.mark.slow
def test_the_packaged_subject_s_sinks_are_found_by_their_norm(tmp_path):
  config = harvest.HarvestConfig(
    sources=('python-stdlib',),
    n_tokens=1500,
    context_length=64,
    max_contexts_per_document=2,
    mask_first=False,
    mask_norm_multiple=10.0,
  )
  manifest = harvest.harvest(config, str(tmp_path))
  opened = store.open_store(str(tmp_path))
  assert 100 < manifest.mask['median_norm'][config.sites[0]] < 250
  assert 0 not in opened.positions()[opened.stream_index()]
  # All first tokens, and hardly another.
  firsts = (opened.positions() == 0).sum()
  assert firsts <= manifest.mask['masked_norm'] <= firsts + 5


@pytest.mark.fast
@pytest.mark.parametrize(('data', 'latent'), [(4, 1), (2, 2)])
def test_a_mesh_harvests_the_same_rows(texts, tmp_path, data, latent):
  """And resumes what another began: where it runs is not part of a plan."""
  alone = _run(_config(texts), tmp_path / 'alone')
  spread = _config(texts, mesh_data=data, mesh_latent=latent)
  _run(spread, tmp_path / 'spread')
  rows = [
    store.open_store(str(tmp_path / name)).read_rows(0, alone.n_rows)
    for name in ('alone', 'spread')
  ]
  np.testing.assert_allclose(*rows, atol=2e-5)
  _run(dataclasses.replace(spread, n_tokens=10**6), tmp_path / 'alone')
  with pytest.raises(config_lib.UserError, match='batch_contexts 4 must be'):
    _run(_config(texts, mesh_data=8), tmp_path / 'other')


@pytest.mark.fast
def test_the_mesh_is_used(texts, tmp_path, monkeypatch):
  placed, run = [], pools._residuals

  def counted(config, params, tokens_BT, *rest):
    shard = params['blocks']['gate'].addressable_shards[0].data
    placed.append(
      (
        tokens_BT.addressable_shards[0].data.shape[0],
        shard.size / params['blocks']['gate'].size,
      )
    )
    return run(config, params, tokens_BT, *rest)

  monkeypatch.setattr(pools, '_residuals', counted)
  _run(_config(texts, mesh_data=2, mesh_latent=2), tmp_path / 'spread')
  assert set(placed) == {(2, 0.5)}
