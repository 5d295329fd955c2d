"""Absorption of first letters: words, probes, scores and the gate."""

import dataclasses

import numpy as np
import pytest
from scipy import special

from sae_jax.probing import ridge
from sae_jax.probing.suite import absorbed, figures, letters, linear_probes
from sae_jax.probing.suite import context as context_lib
from sae_jax.probing.suite.evaluations import absorption
from tests.support import probed, spelled, suites


def figure(outcome, name, who='trained'):
  sample = outcome.samples[who]
  return figures.figure(absorption.STATISTICS[name], sample).value


def slow_scores(a_N, rows_ND, probe_D, x_D, own):
  """Both scores of one word, latent by latent, as the definition says."""
  a_N, rows_ND, x_D = (np.asarray(of, np.float64) for of in (a_N, rows_ND, x_D))
  probe_D = probe_D / np.linalg.norm(probe_D)
  whole = x_D @ probe_D
  cosines, parts = [], []
  for a, row_D in zip(a_N, rows_ND):
    length = np.linalg.norm(row_D)
    cosines.append(row_D @ probe_D / length)
    parts.append(a * length * cosines[-1])
  main = sum(parts[i] for i in own)
  others = sorted(
    (
      part
      for i, part in enumerate(parts)
      if i not in own and cosines[i] >= 0.1 and part > 0
    ),
    reverse=True,
  )
  taken = sum(others[:3])
  if main >= whole or taken / whole < 0.4:
    fraction = 0
  elif main <= 0:
    fraction = 1
  else:
    taken = min(taken, whole - main)
    fraction = taken / (taken + main)
  best = int(np.argmax(parts))
  full = (
    all(a_N[i] < 1e-8 for i in own)
    and cosines[best] >= 0.025
    and whole > 0
    and parts[best] / whole >= 0.4
  )
  return fraction, full


@pytest.mark.parametrize('own', [(0,), (0, 3)])
def test_scores_are_those_of_their_definition(own):
  rng = np.random.default_rng(0)
  n, d, k = 12, 6, 5
  rows_ND = rng.standard_normal((n, d)) * rng.uniform(0.3, 3, (n, 1))
  probe_D = rng.standard_normal(d)
  rows_ND[[0, 3]] += probe_D
  idx_WK = np.stack([rng.permutation(n)[:k] for _ in range(400)])
  vals_WK = rng.uniform(0, 1, (400, k)) * (rng.random((400, k)) < 0.8)
  a_WN = np.zeros((400, n))
  np.put_along_axis(a_WN, idx_WK, vals_WK, 1)
  x_WD = a_WN @ rows_ND + 0.5 * rng.standard_normal((400, d))
  length_N = np.linalg.norm(rows_ND, axis=1)
  unit_D = probe_D / np.linalg.norm(probe_D)
  args = vals_WK, idx_WK, rows_ND @ unit_D / length_N
  got = absorbed.scores(*args, length_N, x_WD @ unit_D, np.array(own))
  want = [slow_scores(a, rows_ND, probe_D, x, own) for a, x in zip(a_WN, x_WD)]
  for of_got, of_want in zip(got, zip(*want)):
    np.testing.assert_allclose(of_got, of_want, atol=1e-9)
  # All cases are there, and rows taken for unit vectors would show.
  fraction_W, full_W = got
  assert (fraction_W == 0).any() and (fraction_W == 1).any() and full_W.any()
  assert ((fraction_W > 0) & (fraction_W < 1)).any()
  wrong_W, _ = absorbed.scores(*args, np.ones(n), x_WD @ unit_D, np.array(own))
  assert np.abs(wrong_W - fraction_W).max() > 0.1


def test_prompts_ask_for_the_first_letter():
  subject = spelled.make_subject()
  known = letters.words(subject.tokenizer)
  assert set(spelled.words()) < set(known)
  assert ':' not in known and '\n' not in known
  asked = letters.drawn(known, 52, np.random.default_rng(0))
  assert np.bincount(list(map(letters.number, asked))).tolist() == [2] * 26
  assert sorted(
    letters.drawn(known, 10**6, np.random.default_rng(0))
  ) == sorted(known)
  out = letters.prompts(
    subject.tokenizer, asked, known, [6], np.random.default_rng(0)
  )
  for word, tokens_T, at in zip(asked, out.tokens_WT, out.at_W):
    text = ''.join(map(subject.tokenizer.id_to_token, tokens_T.tolist()))
    assert tokens_T[0] == 6 and at == len(tokens_T) - 6
    assert subject.tokenizer.id_to_token(int(tokens_T[at])) == word
    *lines, last = text.removeprefix('?\n').split('\n')
    assert last == f'{word} has the first letter:' and len(lines) == 10
    for line in lines:
      own, answer = line.split(' has the first letter: ')
      assert answer == own.strip()[0].upper() and own != word
  # Another seed asks with other examples.
  other = letters.prompts(
    subject.tokenizer, asked, known, [6], np.random.default_rng(1)
  )
  assert (other.tokens_WT != out.tokens_WT).any()


def made_labels(seed=0):
  rng = np.random.default_rng(seed)
  x_PD = rng.standard_normal((400, 6)).astype(np.float32) + 3
  logit_PL = (x_PD - 3) @ rng.standard_normal((6, 2)) * 2 - 1
  return x_PD, rng.random(logit_PL.shape) < special.expit(logit_PL)


def test_dense_probes_are_the_optimum():
  """Of a loss in which both classes count the same."""
  x_PD, labels_PL = made_labels()
  probe = linear_probes.dense(x_PD, labels_PL)
  for label in range(2):
    labels_P = labels_PL[:, label].astype(int)
    count = np.bincount(labels_P)
    share_P = np.where(labels_P == 1, count[0] / count[1], 1.0)
    # |w|^2 / 2 beside the sum is a decay of 1 / (c P L) beside the mean.
    c = np.array([1 / (1e-6 * labels_PL.size)])
    weight_1D, bias_1 = ridge.fit(
      np.float64(x_PD) - x_PD.mean(0), labels_P, share_P[None], c
    )
    bias = bias_1[0] - x_PD.mean(0) @ weight_1D[0]
    np.testing.assert_allclose(
      probe.weight_XL[:, label], weight_1D[0], atol=2e-3
    )
    assert probe.bias_L[label] == pytest.approx(bias, abs=5e-3)
    # Control: with equal shares it is another.
    plain_1D, _ = ridge.fit(
      np.float64(x_PD) - x_PD.mean(0), labels_P, np.ones((1, 400)), c
    )
    assert np.abs(plain_1D[0] - weight_1D[0]).max() > 0.02


def test_few_inputs_are_found_and_kept_as_they_help():
  """Of 30 inputs two tell of a label together, one of the other label."""
  rng = np.random.default_rng(0)
  labels_PL = rng.random((600, 2)) < 0.2
  half_P = rng.random(600) < 0.5
  dense_PN = rng.uniform(0, 1, (600, 30)) * (rng.random((600, 30)) < 0.1)
  dense_PN[:, 4] = labels_PL[:, 0] & half_P
  dense_PN[:, 9] = labels_PL[:, 0] & ~half_P
  dense_PN[:, 2] = labels_PL[:, 1]
  idx_PK = np.argsort(-dense_PN, 1, kind='stable')[:, :16]
  vals_PK = np.take_along_axis(dense_PN, idx_PK, 1).astype(np.float32)
  orders = linear_probes.ranked(
    vals_PK, idx_PK, 30, labels_PL, 100, 0.01, np.random.default_rng(0)
  )
  assert set(orders[0][:2]) == {4, 9} and orders[1][0] == 2
  is_test_P = np.arange(600) % 5 == 0
  out = linear_probes.sparse(
    lambda inputs: dense_PN[:, inputs], is_test_P, labels_PL, orders, 10, 0.03
  )
  assert [set(of.tolist()) for of in out.inputs] == [{4, 9}, {2}]
  np.testing.assert_array_equal(out.f1_L, 1)
  # Where only much more is enough the second of the two stays out.
  out = linear_probes.sparse(
    lambda inputs: dense_PN[:, inputs], is_test_P, labels_PL, orders, 10, 0.6
  )
  assert [len(of) for of in out.inputs] == [1, 1]
  assert out.f1_L[0] < 0.8


def test_batches_read_every_example_as_often(monkeypatch):
  monkeypatch.setattr(linear_probes, '_BATCH', 4)
  batches_SB = linear_probes._batches(13, 6, np.random.default_rng(0))
  assert batches_SB.shape == (6, 4)
  for order in (batches_SB[:3], batches_SB[3:]):
    assert len(set(order.reshape(-1).tolist())) == 12
  assert (linear_probes._batches(4, 2, None) == np.arange(4)).all()


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return suites.write_store(str(tmp_path_factory.mktemp('suite') / 'store'))


def measure(data, scored):
  context = suites.context(
    scored['trained'], data, scored=scored, subject=spelled.make_subject()
  )
  return absorption.measure(context)


def test_planted_absorption_is_found(data, monkeypatch):
  """A tenth of the words have latents that took their letters over."""
  suites.shrink(monkeypatch, absorption, words=260, steps=60, batch_words=64)
  outcome = measure(
    data,
    {
      'trained': spelled.make_trained(True),
      'longer': spelled.make_trained(True, 3.0, 'jumprelu'),
      'whole': spelled.make_trained(False, activation='topk'),
    },
  )
  assert outcome.remarks[0].startswith('260 words; the probes of 26')
  for who in ('trained', 'longer'):
    assert figure(outcome, 'fraction', who) == pytest.approx(0.1, rel=0.1)
    assert figure(outcome, 'full', who) == pytest.approx(0.1, rel=0.1)
  assert figure(outcome, 'fraction', 'whole') == 0
  assert figure(outcome, 'full', 'whole') == 0
  for who in outcome.samples:
    assert figure(outcome, 'latents', who) == 1
  assert figure(outcome, 'latents_f1', 'whole') > 0.97
  assert figure(outcome, 'latents_f1') < 0.97
  assert figure(outcome, 'probe_f1') > 0.97
  rows = outcome.tables['Letters']
  assert len(rows) == 27 and rows[1][:2] == ['a', 10]


def test_a_subject_that_cannot_spell_is_an_answer(data, monkeypatch):
  suites.shrink(monkeypatch, absorption, words=260, steps=20, batch_words=64)
  subject = spelled.make_subject()
  rng = np.random.default_rng(0)
  embed = rng.standard_normal(subject.params['embed'].shape, 'f4')
  blank = dataclasses.replace(subject, params=subject.params | {'embed': embed})
  trained = spelled.make_trained(True)
  context = suites.context(
    trained, data, scored={'trained': trained}, subject=blank
  )
  with pytest.raises(
    context_lib.CannotMeasure,
    match=r'cannot evaluate: the linear probes of \d+ of 26 .* 20 are the fe',
  ):
    absorption.measure(context)
  # One whose tokens are no words at all.
  trained = probed.make_trained(data)
  with pytest.raises(
    context_lib.CannotMeasure, match='0 tokens of the subject'
  ):
    absorption.measure(suites.context(trained, data))
