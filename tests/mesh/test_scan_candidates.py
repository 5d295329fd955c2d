"""Short lists of candidates: exact, or noticed and made again."""

import dataclasses

import jax.numpy as jnp
import pytest

from sae_jax.probing.scan import candidates, run, step
from tests.support import scans

N, K, SHARDS = 1024, 48, 8
# All rows are of one program.
CONFIG = scans.config(
  feature_rows=1140, eval_rows=60, pca_rows=384, batch_rows=384
)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return scans.data(tmp_path_factory.mktemp('store'))


@pytest.fixture(scope='module')
def spread(data):
  """Winners are spread over the shards."""
  return scans.trained(data, n_latents=N, k=K)


@pytest.fixture(scope='module')
def uneven(spread):
  """Nearly all winners are on the third shard."""
  size = N // SHARDS
  b_lat_N = spread.sae.b_lat_N.at[2 * size : 3 * size].add(3)
  return dataclasses.replace(spread, sae=spread.sae.replace(b_lat_N=b_lat_N))


@pytest.fixture
def pieces(monkeypatch):
  """The batches that were done again."""
  seen, real = [], run._Loop._do_in_pieces

  def do_in_pieces(self, part, batch):
    seen.append(part.start)
    real(self, part, batch)

  monkeypatch.setattr(run._Loop, '_do_in_pieces', do_in_pieces)
  monkeypatch.setattr(run, '_PIECES', 2)
  return seen


def numbers(of, data, folder, shape):
  controls = {'same': of}
  return scans.numbers(
    scans.scan(CONFIG, of, data, folder, shape, controls=controls)
  )


def test_lists_are_short_on_many_shards_alone():
  config = scans.autoencoder.SaeConfig(d_model=768, n_latents=2**24, k=256)

  def length(shards, few=True):
    return candidates.list_length(config, 256, 2**17, shards, few)

  assert length(256) == 24 and length(1) == 512
  assert length(256, few=False) == 512


def test_short_lists_give_what_one_shard_does(data, spread, tmp_path, pieces):
  assert candidates.list_length(spread.config, K, 384, SHARDS, True) < 2 * K
  got = numbers(spread, data, tmp_path / 'many', (1, SHARDS))
  assert not pieces
  scans.assert_same(got, numbers(spread, data, tmp_path / 'one', (1, 1)))


def test_lists_that_are_too_short_are_made_again(
  data, uneven, tmp_path, pieces, monkeypatch
):
  want = numbers(uneven, data, tmp_path / 'one', (1, 1))
  got = numbers(uneven, data, tmp_path / 'many', (1, SHARDS))
  assert pieces[:2] == [0, 384]
  # Of values that differ little beside their size, skewness has few digits.
  scans.assert_same(got, want, but=('skew',))
  # Control: where nobody looks, the result is wrong.
  real = candidates.candidates

  def never_short(*args):
    return real(*args).replace(short=jnp.zeros((), bool))

  monkeypatch.setattr(candidates, 'candidates', never_short)
  monkeypatch.setattr(candidates, 'pair_slots', lambda *_: 10**6)
  step.make_step.cache_clear()
  wrong = numbers(uneven, data, tmp_path / 'wrong', (1, SHARDS))
  step.make_step.cache_clear()
  with pytest.raises(AssertionError):
    scans.assert_same(wrong, want, but=('skew',))


def test_more_pairs_than_slots_are_noticed(
  data, spread, tmp_path, pieces, monkeypatch
):
  real = candidates.pair_slots

  def pair_slots(*args):
    return 600 if args[-1] else real(*args)

  monkeypatch.setattr(candidates, 'pair_slots', pair_slots)
  step.make_step.cache_clear()
  got = numbers(spread, data, tmp_path / 'many', (1, SHARDS))
  step.make_step.cache_clear()
  assert pieces
  monkeypatch.undo()
  want = numbers(spread, data, tmp_path / 'one', (1, 1))
  scans.assert_same(got, want, but=('skew',))


def test_controls_whose_lists_are_too_short_are_scored_again(
  data, spread, uneven, tmp_path, pieces, monkeypatch
):
  def measured(folder, shape):
    found = scans.scan(
      CONFIG, spread, data, folder, shape, controls={'other': uneven}
    )
    return {
      name: value
      for name, value in scans.numbers(found).items()
      if name.startswith('other')
    }

  want = measured(tmp_path / 'one', (1, 1))
  scans.assert_same(measured(tmp_path / 'many', (1, SHARDS)), want)
  # The batch in which test rows begin.
  start = data.test_rows.start
  assert pieces == [start - start % CONFIG.batch_rows]
  # Control: where nobody looks, the result is wrong.
  real = candidates.codes

  def never_short(*args):
    return *real(*args)[:2], jnp.zeros((), bool)

  monkeypatch.setattr(candidates, 'codes', never_short)
  step.make_step.cache_clear()
  wrong = measured(tmp_path / 'wrong', (1, SHARDS))
  step.make_step.cache_clear()
  with pytest.raises(AssertionError):
    scans.assert_same(wrong, want)
