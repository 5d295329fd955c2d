"""The suite's figures over probe tasks, and their other splits."""

import types

import numpy as np
import pytest

from sae_jax import mesh as mesh_lib
from sae_jax.probing import task_scores, tasks
from sae_jax.probing.suite import context as context_lib
from sae_jax.probing.suite import figures
from sae_jax.probing.suite.evaluations import probes
from tests.support import probed, reports


def made(draw):
  """Figures of three tasks, which differ by draw; one lacks a score."""
  rng = np.random.default_rng(draw)

  def score():
    train, test = rng.uniform(0.2, 0.7, 2)
    return {
      'best_latent': 3, 'train_ce': train, 'test_ce': test,
      'test_auc': rng.uniform(0.5, 1),
    }  # fmt: skip

  def of_task():
    return {
      'latent': score(),
      'controls': {'permuted': score(), 'random': score()},
      'references': {
        'logistic': score(),
        'mean_difference': {'test_auc': 0.5},
        'k_sparse': [score() | {'k': 8}, score() | {'k': 16}],
      },
    }

  out = {name: of_task() for name in ('1_a', '2_b', '3_c')}
  out['3_c']['controls']['random']['test_ce'] = float('nan')
  return out


def context(again=made):
  return types.SimpleNamespace(
    probed=made(0), probed_again=again, name='trained', draws=5
  )


def test_figures_are_means_over_tasks_and_splits():
  outcome = probes.measure(context())
  every = [made(draw) for draw in range(5)]
  for who, pick in (
    ('trained', lambda of: of['latent']),
    ('random', lambda of: of['controls']['random']),
    ('16 latents', lambda of: of['references']['k_sparse'][1]),
  ):
    got = figures.figure(probes.STATISTICS['test_ce'], outcome.samples[who])
    values = [[pick(of)['test_ce'] for of in draw.values()] for draw in every]
    assert got.value == pytest.approx(np.nanmean(values))
    # The spread of five splits, by Student's quantile of four.
    spread = np.nanmean(values, 1).std(ddof=1)
    assert got.least_difference == pytest.approx(
      2.776445 * (2 / 5) ** 0.5 * spread, rel=1e-5
    )
    assert got.units == 3
  auc = figures.figure(
    probes.STATISTICS['test_auc'], outcome.samples['mean difference']
  )
  assert auc.value == 0.5 and auc.least_difference == 0
  # Control: were all splits the same there would be no spread.
  same = probes.measure(context(lambda draw: made(0)))
  got = figures.figure(probes.STATISTICS['test_ce'], same.samples['trained'])
  assert got.least_difference == pytest.approx(0, abs=1e-12)
  assert outcome.tables['Tasks'][1][0] == '1_a'
  with pytest.raises(context_lib.CannotMeasure, match='has no probe tasks'):
    probes.measure(types.SimpleNamespace(probed={}))


def test_tasks_are_scored_again_with_other_splits(tmp_path, monkeypatch):
  """Other held-out prompts, the same prompts read once."""
  data = probed.write_store(str(tmp_path / 'store'))
  trained = probed.make_trained(data)
  monkeypatch.setattr(tasks, 'load_tasks', reports.made_tasks)
  splits, own = [], tasks.split
  monkeypatch.setattr(
    tasks,
    'split',
    lambda task, seed: splits.append(own(task, seed)) or splits[-1],
  )
  read = []
  pool = task_scores.pooled.pool
  monkeypatch.setattr(
    task_scores.pooled, 'pool', lambda *args: read.append(1) or pool(*args)
  )
  scores = task_scores.measure(
    reports.CONFIG,
    trained,
    probed.make_subject(),
    str(probed.SITE),
    '',
    mesh_lib.one_device(),
  )
  first, again = (scores.again(draw) for draw in (1, 1))
  assert len(read) == 2 and len(splits) == 6
  held_out = [test.tolist() for _, test in splits]
  assert held_out[2:4] == held_out[4:] != held_out[:2]
  np.testing.assert_equal(first, again)
  for name, of in scores.figures.items():
    for kind in ('permuted', 'random'):
      values = (
        of_draw[name]['controls'][kind]['test_ce']
        for of_draw in (scores.figures, first)
      )
      assert len(set(values)) == 2
    assert of['latent']['test_ce'] != first[name]['latent']['test_ce']
