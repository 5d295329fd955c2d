"""Votes and neighbours of decoder rows against full sorts in float64."""

import dataclasses

import jax
import numpy as np
import pytest

from sae_jax import errors
from sae_jax.probing import lens, neighbours, row_blocks
from tests.support import decoders, probed

ROWS = decoders.rows()


@pytest.mark.parametrize('untied', [False, True], ids=['tied', 'untied'])
@pytest.mark.parametrize('n_votes', [4, probed.VOCABULARY])
def test_votes_equal_a_full_sort(untied, n_votes):
  subject = decoders.subject(untied)
  votes = lens.votes(subject, probed.SITE, ROWS, n_votes)
  decoders.assert_equal(votes, decoders.expected_votes(subject, ROWS, n_votes))
  # Control: without the norm's weights other tokens win.
  bare = decoders.expected_votes(subject, ROWS, n_votes, norm=False)
  with pytest.raises(AssertionError):
    decoders.assert_equal(votes, bare)


@pytest.mark.parametrize('count', [1, 12])
def test_neighbours_equal_a_full_sort(count):
  nearest = neighbours.nearest(ROWS, count)
  decoders.assert_equal(nearest, decoders.expected_neighbours(ROWS, count))
  ids = np.asarray(nearest.ids_NC)
  assert (ids != np.arange(len(ROWS))[:, None]).all()
  # A twin, of whatever length, before all others; the lower of a kind.
  assert ids[[9, 77, 100, 200, 211], 0].tolist() == [77, 9, 9, 201, 200]
  # Control: products of rows as they are would name others.
  product_NN = ROWS @ ROWS.T
  np.fill_diagonal(product_NN, -np.inf)
  assert (product_NN.argmax(1) != ids[:, 0]).any()


def test_all_latents_may_be_neighbours():
  everyone = decoders.N_LATENTS - 1
  ids, cosines = map(np.asarray, neighbours.nearest(ROWS, everyone))
  want_ids, want = decoders.expected_neighbours(ROWS, everyone)
  # Of so many pairs some are within rounding of each other.
  np.testing.assert_allclose(cosines, want, rtol=0, atol=1e-6)
  np.testing.assert_array_equal(np.sort(ids), np.sort(want_ids))
  np.testing.assert_array_equal(ids[5], want_ids[5])


def test_a_row_of_zeros_is_near_nothing():
  ids, cosines = map(np.asarray, neighbours.nearest(ROWS, 4))
  np.testing.assert_array_equal(cosines[5], 0)
  np.testing.assert_array_equal(ids[5], range(4))
  others = np.delete(ids, 5, axis=0)
  assert 5 not in others
  ids, logits, _, _ = lens.votes(decoders.subject(), probed.SITE, ROWS, 4)
  np.testing.assert_array_equal(ids[5], range(4))
  np.testing.assert_array_equal(logits[5], 0)


def test_one_latent_alone_has_no_neighbours():
  assert neighbours.nearest(ROWS[:1], 0).ids_NC.shape == (1, 0)


def test_none_that_are_asked_for_take_no_subject():
  for array in (
    *lens.votes(None, probed.SITE, ROWS, 0), *neighbours.nearest(ROWS, 0)
  ):  # fmt: skip
    assert array.shape == (len(ROWS), 0)


@pytest.mark.parametrize('block_rows', [5, 40])
def test_blocks_do_not_matter(block_rows, monkeypatch):
  # Several calls of several blocks, and parts that overlap.
  monkeypatch.setattr(row_blocks, '_CALL_BLOCKS', 3)
  monkeypatch.setattr(neighbours, '_MOST_OTHERS', 70)
  votes = lens.votes(decoders.subject(), probed.SITE, ROWS, 3, block_rows)
  decoders.assert_equal(
    votes, decoders.expected_votes(decoders.subject(), ROWS, 3)
  )
  nearest = neighbours.nearest(ROWS, 3, block_rows)
  decoders.assert_equal(nearest, decoders.expected_neighbours(ROWS, 3))


def test_blocks_are_as_large_as_the_memory_allows():
  rows = row_blocks.on_mesh(np.zeros((10_000, 2), np.float32))
  blocks = row_blocks.blocks_of(rows, 50_257)
  assert blocks.rows == 512
  assert blocks.per_call * blocks.calls == 20
  assert row_blocks.blocks_of(rows, 2**31).rows == 8
  assert row_blocks.blocks_of(rows, 10).rows == 1024


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_named(value):
  rows = ROWS.copy()
  rows[[70, 190], 3] = value
  said = r'decoder weights of latent 70 are not finite: .* another run'
  with pytest.raises(errors.UserError, match=said):
    neighbours.nearest(rows, 4)
  with pytest.raises(errors.UserError, match=said):
    lens.votes(decoders.subject(), probed.SITE, rows, 4)


def test_a_subject_that_is_not_finite_is_named():
  subject = decoders.subject()
  unembed = subject.params['unembed'].copy()
  unembed[7, 3] = np.nan
  subject = dataclasses.replace(
    subject, params=subject.params | {'unembed': unembed}
  )
  with pytest.raises(errors.UserError, match=r'latent 0 .* weights of made'):
    lens.votes(subject, probed.SITE, ROWS, 4)
  # Control: a token's row that no text reaches does not matter.
  words = probed.VOCABULARY - 1
  unembed[-1], unembed[7] = np.nan, 0
  tokens = {f'w{i}': i for i in range(words)}
  made = subject.tokenizer.from_str(subject.tokenizer.to_str())
  made.model = made.model.__class__(tokens, unk_token='w0')
  subject = dataclasses.replace(subject, tokenizer=made)
  votes = lens.votes(subject, probed.SITE, ROWS, 4)
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(votes))
