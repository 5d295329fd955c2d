"""References: logistic regression by its own optimum, the protocol by hand."""

import numpy as np
import pytest
from scipy import optimize, sparse

from sae_jax.probing import probes, references, ridge


def objective(theta, x_PD, y_P, c):
  logit_P = x_PD @ theta[:-1] + theta[-1]
  nats_P = np.logaddexp(0, logit_P) - y_P * logit_P
  return c * nats_P.sum() + (theta[:-1] ** 2).sum() / 2


def make_task(n_prompts=80, width=6, seed=0, effect=1.0):
  rng = np.random.default_rng(seed)
  y_P = rng.permutation(np.arange(n_prompts) % 2)
  x_PD = rng.standard_normal((n_prompts, width))
  x_PD[:, 0] += effect * y_P
  return x_PD, y_P


@pytest.mark.parametrize('c', [1e-5, 1.0, 1e5])
def test_regression_is_at_the_optimum(c):
  x_PD, y_P = make_task()
  share_1P = np.ones((1, len(y_P)))
  (weight_D,), (bias,) = ridge.fit(x_PD, y_P, share_1P, np.array([c]))
  theta = np.append(weight_D, bias)
  least = objective(theta, x_PD, y_P, c)
  by_scipy = optimize.minimize(
    objective,
    np.zeros(7),
    (x_PD, y_P, c),
    options={'gtol': 1e-6 * max(c, 1e-3)},
  )
  assert least <= by_scipy.fun * (1 + 1e-12)
  np.testing.assert_allclose(theta, by_scipy.x, atol=2e-4)
  # Control: with the intercept penalised too the optimum is another.
  assert objective(theta * 0.99, x_PD, y_P, c) > least


def test_regressions_of_a_batch_are_those_of_each():
  x_PD, y_P = make_task()
  # One of them separates the classes of the prompts that count.
  share_BP = np.random.default_rng(1).random((3, 80)) < [[0.8], [0.5], [0.1]]
  c_B = np.array([1e5, 1.0, 1e5])
  weight_BD, bias_B = ridge.fit(x_PD, y_P, share_BP * 1.0, c_B)
  for weight_D, bias, share_P, c in zip(weight_BD, bias_B, share_BP, c_B):
    (alone_D,), (alone,) = ridge.fit(
      x_PD[share_P], y_P[share_P], np.ones((1, share_P.sum())), np.array([c])
    )
    np.testing.assert_allclose(weight_D, alone_D, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(bias, alone, rtol=1e-4, atol=1e-6)


def test_more_inputs_than_prompts():
  x_PD, y_P = make_task(n_prompts=40, width=200)
  fitted = ridge.cross_validated(x_PD, y_P)
  theta = np.append(fitted.weight_D, fitted.bias)
  least = objective(theta, x_PD, y_P, fitted.c)
  rng = np.random.default_rng(2)
  for _ in range(20):
    moved = theta + 1e-3 * rng.standard_normal(201)
    assert objective(moved, x_PD, y_P, fitted.c) > least


def test_folds_leave_each_prompt_out_once():
  for n_prompts, n_folds in ((10, 25), (80, 6), (127, 6)):
    y_P = np.arange(n_prompts) % 2
    folds_FP = ridge._folds(y_P, 0)
    assert len(folds_FP) == n_folds
    counts = folds_FP.sum(0)
    assert counts.min() == counts.max() == (5 if n_prompts == 10 else 1)
    for row_P in folds_FP:
      assert 0 < y_P[row_P].sum() < row_P.sum()
  for n_prompts, n_out in ((128, 25), (1000, 100)):
    (row_P,) = ridge._folds(np.arange(n_prompts) % 2, 0)
    np.testing.assert_array_equal(
      np.flatnonzero(row_P), np.arange(n_prompts - n_out, n_prompts)
    )
  # Of two prompts none can be left out.
  assert not len(ridge._folds(np.array([0, 1]), 0))
  assert ridge.cross_validated([[0.0], [1.0]], [0, 1]).c == 1.0


def test_the_penalty_is_chosen_on_prompts_left_out():
  x_PD, y_P = make_task(n_prompts=60, width=70, effect=1.0)
  fitted = ridge.cross_validated(x_PD, y_P)
  left_out_FP = ridge._folds(y_P, 0)
  aucs = [
    np.mean(
      [
        probes.auc((x_PD[row_P] @ weight_D + bias)[:, None], y_P[row_P])[0]
        for row_P in left_out_FP
        for (weight_D,), (bias,) in [
          ridge.fit(
            x_PD[~row_P],
            y_P[~row_P],
            np.ones((1, (~row_P).sum())),
            np.array([c]),
          )
        ]
      ]
    )
    for c in ridge.CS
  ]
  assert fitted.c == ridge.CS[int(np.argmax(aucs))]
  np.testing.assert_allclose(fitted.validation_auc, max(aucs))


def make_codes(seed=0, n_prompts=90, n_latents=40):
  """Sparse codes of which latents 5 and 30 know half of the label each."""
  rng = np.random.default_rng(seed)
  y_P = rng.permutation(np.arange(n_prompts) % 2)
  codes_PN = rng.exponential(1, (n_prompts, n_latents)) * rng.uniform(
    0.1, 10, n_latents
  )
  codes_PN *= rng.random((n_prompts, n_latents)) < 0.2
  half_P = rng.random(n_prompts) < 0.5
  codes_PN[:, 5] = 0.01 * (y_P & half_P) * (1 + rng.random(n_prompts))
  codes_PN[:, 30] = 5 * (y_P & ~half_P) * (1 + rng.random(n_prompts))
  return codes_PN, y_P


def test_latents_are_ranked_by_the_protocol():
  codes_PN, y_P = make_codes()
  # As in sae_probes.run_sae_evals.
  count_N = (codes_PN != 0).sum(0)
  normal_PN = codes_PN / (np.abs(codes_PN).sum(0) / (count_N + 1e-6) + 1e-6)
  difference_N = normal_PN[y_P == 1].mean(0) - normal_PN[y_P == 0].mean(0)
  want = np.argsort(-np.abs(difference_N), kind='stable')
  ranked = references.by_mean_difference(sparse.csr_array(codes_PN), y_P)
  np.testing.assert_array_equal(ranked, want)
  assert set(ranked[:2]) == {5, 30}
  # Control: without the division the small latent is not among the first.
  plain_N = codes_PN[y_P == 1].mean(0) - codes_PN[y_P == 0].mean(0)
  assert 5 not in np.argsort(-np.abs(plain_N))[:5]


def scores(seed=0, permute=False, leak=False):
  """Scores on prompts of one draw, labels shuffled or prompts leaked."""
  rng = np.random.default_rng(seed)
  codes_PN, y_P = make_codes(seed, 180)
  x_PD = rng.standard_normal((180, 20)) + 0.7 * y_P[:, None]
  if permute:
    y_P = rng.permutation(y_P)
  train, test = np.arange(90), np.arange(90, 180)
  if leak:
    test = train
  sides = [
    (x_PD[side], sparse.csr_array(codes_PN[side]), y_P[side])
    for side in (train, test)
  ]
  return references.scores(*sides[0], *sides[1])


def test_scores_are_those_of_the_prompts_held_out():
  result = scores()
  assert list(result) == list(references.REFERENCE_DEFINITIONS)
  for name in ('logistic', 'mean_difference'):
    score = result[name]
    assert score['test_auc_low'] < score['test_auc'] < score['test_auc_high']
    assert score['test_auc'] > 0.9, name
  ks = [score['k'] for score in result['k_sparse']]
  assert ks == [1, 2, 4, 8, 16, 32]
  one, two = result['k_sparse'][:2]
  # Each of the two knows half of the label.
  assert 0.65 < one['test_auc'] < 0.85 and two['test_auc'] > 0.95
  assert two['test_ce'] < one['test_ce'] < np.log(2)


def test_shuffled_labels_score_as_chance_and_a_leak_does_not():
  aucs = {False: [], True: []}
  for leak, of_seeds in aucs.items():
    for seed in range(6):
      result = scores(seed, permute=True, leak=leak)
      of_seeds.append(
        [
          result['logistic']['test_auc'],
          result['mean_difference']['test_auc'],
          *[score['test_auc'] for score in result['k_sparse']],
        ]
      )
  assert np.abs(np.mean(aucs[False], 0) - 0.5).max() < 0.1
  # Prompts of both sides of the split would be seen at once.
  means = np.mean(aucs[True], 0)
  assert (means > np.mean(aucs[False], 0)).all() and means[-1] > 0.75
