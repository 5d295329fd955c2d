"""Pools: which tokens are kept, and no context is read twice."""

import dataclasses
import json
import re

import numpy as np
import pytest

from sae_jax import errors, store
from sae_jax.harvesting import harvest, pools
from tests.support import toy


def test_loud_tokens_are_masked_and_counted(tmp_path, caplog):
  path = tmp_path / 'loud.jsonl'
  lines = [f'{i:02} abc~defgh ijk' for i in range(40)]
  path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in lines))
  loud = toy.subject().tokenizer.encode('~').ids[0]
  masked = toy.run(
    toy.config(path, mask_norm_multiple=10.0), tmp_path / 'masked'
  )
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
  assert 'masked_nonfinite' not in masked.mask
  norms = np.linalg.norm(opened.read_rows(0, masked.n_rows), axis=1)
  assert norms.max() <= 10 * masked.mask['median_norm'][str(toy.SITE)]
  assert not re.search('attention sinks|not finite', caplog.text)
  # Without the rules these rows are there, and loud.
  config = toy.config(path, mask_norm_multiple=0.0, mask_first=False)
  everything = toy.run(config, tmp_path / 'all')
  opened = store.open_store(str(tmp_path / 'all'))
  assert everything.n_rows == everything.n_stream == len(stream)
  norms = np.linalg.norm(opened.read_rows(0, len(stream)), axis=1)
  assert (norms > 10 * masked.mask['median_norm'][str(toy.SITE)]).sum() == 40
  assert everything.mask['masked_norm'] == 0
  warning = r'32 of the first 512 tokens at .* more than 10 times the median'
  assert re.search(warning, caplog.text)


def test_the_median_is_that_of_the_first_contexts(texts, tmp_path):
  config = toy.config(texts, mask_norm_multiple=2.0)
  manifest = toy.run(config, tmp_path / 'store')
  pool = [
    toy.resid(tokens)[1:] for _, tokens in toy.expected_contexts(config)[:32]
  ]
  norms = np.linalg.norm(np.concatenate(pool).astype(np.float64), axis=1)
  np.testing.assert_allclose(
    manifest.mask['median_norm'][config.sites[0]], np.median(norms), rtol=1e-5
  )


def test_no_context_is_read_twice(texts, tmp_path, monkeypatch):
  """The pool that the mask is fitted to is stored, unless it was before."""
  seen, run = [], pools._residuals

  def counted(config, params, tokens_BT, *rest):
    seen.append(np.asarray(tokens_BT))
    return run(config, params, tokens_BT, *rest)

  monkeypatch.setattr(pools, '_residuals', counted)
  config = toy.config(texts, shard_rows=4096, mask_norm_multiple=10.0)
  toy.run(config, tmp_path / 'store')
  read = [row for tokens in seen for row in tokens if row.any()]
  want = toy.expected_contexts(config)
  assert len(read) == len(want)
  # Control: shards that end before the pool does have pools of their own.
  seen.clear()
  toy.run(toy.config(texts, mask_norm_multiple=10.0), tmp_path / 'small')
  again = [row for tokens in seen for row in tokens if row.any()]
  assert len(again) > len(want)


def test_padding_is_of_no_other_token(texts, tmp_path):
  """Its weight is 0, and 0 times what is not finite is NaN."""
  subject = toy.subject()
  params = subject.params | {'embed': subject.params['embed'].at[0].set(np.nan)}
  broken = dataclasses.replace(subject, params=params)
  harvest.harvest(toy.config(texts), str(tmp_path / 'broken'), broken)
  assert not (store.open_store(str(tmp_path / 'broken')).tokens() == 0).any()
  toy.run(toy.config(texts), tmp_path / 'whole')
  assert toy.stored(tmp_path / 'broken') == toy.stored(tmp_path / 'whole')


def test_activations_that_are_not_finite_are_masked_and_said(
  texts, tmp_path, caplog
):
  subject = toy.subject()
  params = dict(subject.params)
  bad = subject.tokenizer.encode('1').ids[0]
  params['embed'] = params['embed'].at[bad].set(np.nan)
  broken = dataclasses.replace(subject, params=params)
  config = toy.config(texts)
  manifest = harvest.harvest(config, str(tmp_path / 'store'), broken)
  opened = store.open_store(str(tmp_path / 'store'))
  rows = opened.read_rows(0, manifest.n_rows)
  assert np.isfinite(rows).all()
  # All that comes after the token in a context sees it.
  tokens, positions = opened.tokens(), opened.positions()
  context = np.cumsum(positions == 0)
  seen = np.array(
    [
      (tokens[: i + 1][context[: i + 1] == context[i]] == bad).any()
      for i in range(len(tokens))
    ]
  )
  masked = manifest.mask['masked_nonfinite']
  assert masked == (seen & (positions > 0)).sum() > 0
  assert manifest.mask['masked_norm'] == 0
  place = int(np.argmax(seen))
  first = (
    f"first those of token {bad} ('1'), at position {positions[place]} of "
    f'document {opened.documents()[place]}'
  )
  assert caplog.text.count(first) == 1
  share = 100 * masked / (masked + manifest.n_rows)
  assert (
    f'{masked} of {masked + manifest.n_rows} activations ({share:.3g} %) are '
    'not finite' in caplog.text
  )
  params['embed'] = params['embed'].at[:].set(np.nan)
  with pytest.raises(errors.UserError, match='is finite'):
    harvest.harvest(config, str(tmp_path / 'nan'), broken)
