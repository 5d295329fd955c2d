"""Votes and neighbours of decoder rows against full sorts in float64."""

import dataclasses

import numpy as np
import pytest

from sae_jax.probing import lens
from tests.support import probed

RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((21, probed.D_MODEL)).astype(np.float32)


def make_subject(untied):
  """A subject whose final norm scales channels unlike."""
  subject = probed.make_subject()
  rng = np.random.default_rng(1)
  params = subject.params | {
    'final_norm': rng.uniform(0.2, 3, probed.D_MODEL).astype(np.float32)
  }
  if untied:
    shape = subject.params['embed'].shape
    params['unembed'] = rng.standard_normal(shape).astype(np.float32)
  return dataclasses.replace(subject, params=params)


def all_votes(subject, w_ND, norm=True):
  params = subject.params
  table_VD = np.asarray(params.get('unembed', params['embed']), np.float64)
  scale_D = np.asarray(params['final_norm'], np.float64) if norm else 1.0
  logits_NV = (w_ND * scale_D) @ table_VD.T
  return logits_NV - logits_NV.mean(1, keepdims=True)


@pytest.mark.parametrize('untied', [False, True], ids=['tied', 'untied'])
@pytest.mark.parametrize('n_votes', [4, probed.VOCABULARY])
def test_votes_equal_a_full_sort(untied, n_votes):
  subject = make_subject(untied)
  strongest = lens.votes(subject, probed.SITE, ROWS, n_votes, chunk=8)
  up_ids, up, down_ids, down = strongest
  logits_NV = all_votes(subject, ROWS)
  order_NV = np.argsort(-logits_NV, axis=1, kind='stable')
  for ids, values, want_ids in (
    (up_ids, up, order_NV[:, :n_votes]),
    (down_ids, down, order_NV[:, ::-1][:, :n_votes]),
  ):
    assert ids.shape == (21, n_votes)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(
      values, np.take_along_axis(logits_NV, want_ids, 1), rtol=1e-4, atol=1e-5
    )
  assert (up[:, 0] > 0).all() and (down[:, 0] < 0).all()
  # Control: without the norm's weights other tokens win.
  bare_NV = all_votes(subject, ROWS, norm=False)
  assert (bare_NV.argmax(1) != up_ids[:, 0]).any()


def test_the_chunk_does_not_matter():
  subject = make_subject(False)
  for one, other in zip(
    lens.votes(subject, probed.SITE, ROWS, 4, chunk=5),
    lens.votes(subject, probed.SITE, ROWS, 4),
  ):
    np.testing.assert_allclose(one, other, rtol=1e-5)
  for one, other in zip(
    lens.neighbours(ROWS, 3, chunk=5), lens.neighbours(ROWS, 3)
  ):
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_neighbours_equal_a_full_sort():
  # Lengths must not count; the nearest row is a twin, not the row itself.
  w_ND = ROWS * RNG.uniform(0.1, 9, (21, 1)).astype(np.float32)
  w_ND[4] = 2 * w_ND[17]
  ids, cosines = lens.neighbours(w_ND, 20, chunk=8)
  wide_ND = w_ND.astype(np.float64)
  unit_ND = wide_ND / np.linalg.norm(wide_ND, axis=1, keepdims=True)
  cosine_NN = unit_ND @ unit_ND.T
  np.fill_diagonal(cosine_NN, -np.inf)
  order_NN = np.argsort(-cosine_NN, axis=1)[:, :20]
  want = np.take_along_axis(cosine_NN, order_NN, 1)
  np.testing.assert_allclose(cosines, want, atol=1e-5)
  # The twins tie with respect to all others.
  alone = ~np.isin(order_NN, (4, 17)).any(1) | (np.diff(want).max(1) < -1e-6)
  np.testing.assert_array_equal(ids[alone], order_NN[alone])
  assert (ids != np.arange(21)[:, None]).all()
  assert ids[4, 0] == 17 and ids[17, 0] == 4
  np.testing.assert_allclose(cosines[[4, 17], 0], 1, rtol=1e-6)
  # Control: products of rows as they are would name others.
  product_NN = wide_ND @ wide_ND.T
  np.fill_diagonal(product_NN, -np.inf)
  assert (product_NN.argmax(1) != ids[:, 0]).any()


def test_a_row_of_zeros_is_near_nothing():
  w_ND = ROWS.copy()
  w_ND[2] = 0
  ids, cosines = lens.neighbours(w_ND, 4)
  assert np.isfinite(cosines).all()
  np.testing.assert_array_equal(cosines[2], 0)
  assert 2 not in ids[2]
