"""Scores of explanations against their definitions in float64."""

import itertools

import numpy as np
import pytest
from scipy import stats

from sae_jax.explaining import asking, examples, scores
from sae_jax.explaining.examples import Text
from sae_jax.probing import intervals


def made_texts(tenth_texts=10, negatives=(50, 25, 25)):
  """Texts of every kind, each document twice."""
  kinds = [('tenth', t) for t in range(10) for _ in range(tenth_texts)]
  for kind, count in zip(examples.NEGATIVES, negatives):
    kinds += [(kind, -1)] * count
  return [Text(k, t, i // 2, (i,)) for i, (k, t) in enumerate(kinds)]


def made_answers(texts, rng, orders=2, skill=0.4, missing=0.1):
  label_X = np.array([text.kind == 'tenth' for text in texts])
  p_XO = rng.random((len(texts), orders)) + skill * (label_X - 0.5)[:, None]
  p_XO = np.round(np.clip(p_XO, 0, 1), 1)
  p_XO[rng.random(p_XO.shape) < missing] = np.nan
  return label_X, p_XO


def by_hand(texts, p_XO):
  """Every figure, text by text."""
  rights, points, agree = {}, [], []
  for text, p_O in zip(texts, p_XO.tolist()):
    given = [p for p in p_O if p == p]
    for one, other in itertools.combinations(p_O, 2):
      if one == one and other == other:
        agree.append((one > 0.5) == (other > 0.5))
    if not given:
      continue
    active = text.kind == 'tenth'
    right = np.mean(
      [0.5 if p == 0.5 else float((p > 0.5) == active) for p in given]
    )
    rights.setdefault((text.kind, text.tenth), []).append(right)
    points.append((active, np.mean(given)))
  active, inactive = (
    [r for key, of in rights.items() for r in of if (key[0] == 'tenth') == on]
    for on in (True, False)
  )
  wins = [
    1.0 if p > q else 0.5 if p == q else 0.0
    for (a, p), (b, q) in itertools.product(points, points)
    if a and not b
  ]
  return {
    'sensitivity': np.mean(active),
    'specificity': np.mean(inactive),
    'balanced_accuracy': (np.mean(active) + np.mean(inactive)) / 2,
    'auroc': np.mean(wins),
    'consistency': np.mean(agree) if agree else None,
    'by_tenth': [np.mean(rights['tenth', t]) for t in range(10)],
    'by_class': {k: np.mean(rights[k, -1]) for k in examples.NEGATIVES},
    'answered': len(points) / len(texts),
  }


@pytest.mark.parametrize('orders', [1, 2, 3])
def test_a_score_is_its_definition(orders):
  rng = np.random.default_rng(orders)
  texts = made_texts(4, (12, 6, 6))
  _, p_XO = made_answers(texts, rng, orders)
  got, want = scores.score(texts, p_XO), by_hand(texts, p_XO)
  for name in ('sensitivity', 'specificity', 'balanced_accuracy', 'auroc'):
    value, low, high = getattr(got, name)
    assert value == pytest.approx(want[name], abs=1e-12)
    assert 0 <= low < value < high <= 1
  assert got.consistency == pytest.approx(want['consistency'], abs=1e-12)
  assert (got.consistency is None) == (orders == 1)
  np.testing.assert_allclose(got.by_tenth, want['by_tenth'], atol=1e-12)
  assert got.by_class == pytest.approx(want['by_class'], abs=1e-12)
  assert got.answered == pytest.approx(want['answered'], abs=1e-12)
  has_X = ~np.isnan(p_XO).all(1)
  got_X = scores.averaged(p_XO)
  assert np.isnan(got_X[~has_X]).all()
  np.testing.assert_allclose(got_X[has_X], np.nanmean(p_XO[has_X], 1))


def test_what_is_hardly_answered_has_no_score():
  texts = made_texts(4, (12, 6, 6))
  p_XO = np.full((len(texts), 1), 0.9)
  p_XO[:19] = np.nan
  assert scores.score(texts, p_XO) is not None
  p_XO[:21] = np.nan
  # More than half of the active ones; nothing is put in their place.
  assert scores.score(texts, p_XO) is None
  assert scores.score(texts, np.full_like(p_XO, np.nan)) is None


def test_wilsons_interval_solves_its_equation():
  """Its ends are the shares from which what was seen is 1.96 errors away."""
  reach = stats.norm.ppf(0.975)
  for share, count in ((0.0, 10), (0.3, 10), (0.5, 1), (0.97, 200), (1.0, 7)):
    got, low, high = intervals.wilson(share, count)
    assert got == share and 0 <= low <= share <= high <= 1
    assert (low == share) == (share == 0) and (high == share) == (share == 1)
    for end in (low, high):
      away = reach * np.sqrt(end * (1 - end) / count)
      assert abs(share - end) == pytest.approx(away, abs=1e-9)
  # 200 trials know 80 % to 5.6 points.
  _, low, high = intervals.wilson(0.8, 200)
  assert (high - low) / 2 == pytest.approx(0.055, abs=1e-3)


def test_intervals_of_a_latent_cover_the_truth():
  """In 95 % of draws; control: half as wide ones do not."""
  rng, texts = np.random.default_rng(0), made_texts()
  label_X = np.array([text.kind == 'tenth' for text in texts])
  held, held_half = [], []
  for _ in range(400):
    right_X = rng.random(len(texts)) < np.where(label_X, 0.9, 0.7)
    p_XO = np.where(label_X == right_X, 1.0, 0.0)[:, None]
    value, low, high = scores.score(texts, p_XO).balanced_accuracy
    held.append(low <= 0.8 <= high)
    half = (value + low) / 2, (value + high) / 2
    held_half.append(half[0] <= 0.8 <= half[1])
  assert np.mean(held) == pytest.approx(0.95, abs=0.03)
  assert np.mean(held_half) < 0.8


def test_means_and_differences_are_over_latents():
  rng = np.random.default_rng(0)
  one = dict(enumerate(rng.random(30).tolist()))
  other = {n: one[n] - 0.1 + 0.01 * rng.random() for n in range(5, 30)}
  got = scores.mean(one | {99: None})
  values = np.array(list(one.values()))
  reach = stats.t.ppf(0.975, 29) * values.std(ddof=1) / np.sqrt(30)
  assert got['value'] == pytest.approx(values.mean(), abs=1e-12)
  assert got['high'] - got['value'] == pytest.approx(reach, rel=1e-9)
  assert got['units'] == 30
  paired = scores.difference(one, other, paired=True)
  want = np.array([one[n] - other[n] for n in other])
  assert paired['value'] == pytest.approx(want.mean(), abs=1e-12)
  assert paired['high'] - paired['low'] < 0.01
  # Control: as other latents they tell far less.
  loose = scores.difference(one, other, paired=False)
  assert loose['high'] - loose['low'] > 10 * (paired['high'] - paired['low'])
  assert scores.difference(one, {}, paired=True) is None
  assert scores.mean({})['value'] is None


def test_documents_are_the_units_of_their_interval():
  """Errors that a document's texts share widen it; control: shuffled ones."""
  rng = np.random.default_rng(0)
  texts = [
    Text(kind, tenth, document, (n,))
    for document in range(40)
    for n, (kind, tenth) in enumerate([('tenth', 0), ('random', -1)] * 10)
  ]
  hard_X = np.repeat(rng.random(40) < 0.5, 20)
  label_X = np.array([text.kind == 'tenth' for text in texts])

  def width(wrong_X):
    p_XO = np.where(label_X ^ wrong_X, 1.0, 0.0)[:, None]
    got = scores.by_document([(texts, p_XO)])
    assert got['value'] == pytest.approx(1 - wrong_X.mean(), abs=0.02)
    assert got['units'] == 40
    return got['high'] - got['low']

  assert width(hard_X) > 3 * width(rng.permutation(hard_X))
  assert scores.by_document([])['value'] is None


def test_shrinkage_undoes_the_winners_curse():
  rng, texts = np.random.default_rng(0), made_texts(2, (10, 5, 5))
  label_X = np.array([text.kind == 'tenth' for text in texts])
  true_N = np.clip(rng.normal(0.75, 0.08, 200), 0.5, 1)
  own = []
  for true in true_N:
    right_X = rng.random(len(texts)) < true
    own.append(
      scores.score(texts, np.where(label_X == right_X, 1.0, 0.0)[:, None])
    )
  raw = np.array([one.balanced_accuracy[0] for one in own])
  moved = scores.shrunk(own)
  best, best_raw = np.argsort(-moved)[:20], np.argsort(-raw)[:20]
  curse = (raw[best_raw] - true_N[best_raw]).mean()
  left = (moved[best] - true_N[best]).mean()
  assert curse > 0.05 and abs(left) < 0.5 * curse
  assert ((moved - true_N) ** 2).mean() < 0.8 * ((raw - true_N) ** 2).mean()
  # The estimate itself, by its formula.
  variance = np.array([one.variance for one in own])
  between = max(0, raw.var(ddof=1) - variance.mean())
  want = raw.mean() + between / (between + variance) * (raw - raw.mean())
  np.testing.assert_allclose(moved, want, rtol=1e-12)
  assert scores.shrunk(own[:1]) == [raw[0]]


def test_tokens_are_the_baseline():
  texts = [Text('tenth', 0, 0, (1, 2)), Text('random', -1, 1, (3, 4))]
  assert scores.has_token(texts, (2, 9)).tolist() == [[1], [0]]
  assert scores.has_token(texts, ()).tolist() == [[0], [0]]


def test_another_latent_is_of_similar_density():
  density_N = np.array([0.5, 0.001, 0.45, 0.0, 0.0012, 0.1], np.float32)
  got = asking.partners([5, 4, 2, 1, 0], density_N)
  assert got == {0: 2, 1: 4, 2: 0, 4: 1, 5: 2}
  assert asking.partners([3], density_N) == {}
  assert asking.partners([], density_N) == {}
