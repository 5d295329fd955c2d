"""The study of short runs: its cells, and the means and intervals it prints."""

import json

import numpy as np
import pytest
from scipy import stats

from experiments import short_runs
from sae_jax.training import defaults

SHAPE = '4096:32:300000'
CONFIG = short_runs.ShortRunsConfig(shapes=(SHAPE,))


def resolved(variant):
  run = short_runs.run_config('4096:32:300000', variant, 3, CONFIG)
  return defaults.resolve(run, 32_768)


def test_a_variant_differs_from_the_defaults_in_one_thing():
  same = short_runs.run_config('4096:32:300000', 'defaults', 3, CONFIG)
  assert (same.steps, same.seed, same.order_seed) == (293, 3, 3)
  flat = {
    name: short_runs.config_lib.flat(resolved(name)) for name in CONFIG.variants
  }
  first = flat.pop('defaults')
  for name, values in flat.items():
    changed = [field for field in first if values[field] != first[field]]
    wanted = ['decoder_init', 'encoder_gain'] if 'norm' in name else [None]
    assert len(changed) == len(wanted), (name, changed)


@pytest.mark.parametrize(
  ('variant', 'factor'), [('half the rate', 0.5), ('twice the rate', 2.0)]
)
def test_a_factor_is_of_the_rate_of_the_rule(variant, factor):
  rate = resolved('defaults').optimizer.learning_rate
  np.testing.assert_allclose(
    resolved(variant).optimizer.learning_rate, factor * rate, rtol=1e-12
  )


def test_a_rate_can_be_that_of_another_number_of_tokens():
  def rate(shape, variant):
    run = short_runs.run_config(shape, variant, 0, CONFIG)
    return defaults.learning_rate(run)

  long = '4096:32:20000000'
  want = rate('4096:32:1000000', 'defaults')
  assert rate(long, 'the rate of 1M') == pytest.approx(want)
  assert rate(long, 'half the rate of 1M') == pytest.approx(want / 2)
  assert rate(long, 'defaults') < 0.9 * want


def test_finished_cells_are_not_run_again(tmp_path):
  file = tmp_path / 'results.jsonl'
  config = short_runs.ShortRunsConfig(
    shapes=CONFIG.shapes,
    variants=('defaults', 'no warm-up'),
    seeds=('0', '1'),
    results=str(file),
  )
  assert [c[1:] for c in short_runs.cells(config)] == [
    (0, ['defaults', 'no warm-up']), (1, ['defaults', 'no warm-up'])
  ]  # fmt: skip
  line = {
    'shape': CONFIG.shapes[0], 'seed': 0, 'batch_size': 1024,
    'variant': 'no warm-up',
  }  # fmt: skip
  other = line | {'batch_size': 512, 'variant': 'defaults'}
  file.write_text(''.join(json.dumps(row) + '\n' for row in (line, other)))
  assert [c[1:] for c in short_runs.cells(config)] == [
    (0, ['defaults']), (1, ['defaults', 'no warm-up'])
  ]  # fmt: skip


def test_means_have_the_interval_of_their_seeds():
  fvus = [0.2, 0.21, 0.25]
  rows = [
    {
      'shape': 'a', 'batch_size': 8, 'variant': 'b', 'seed': seed,
      'validation_fvu': fvu, 'test_fvu': 2 * fvu, 'train_silent': 0.0,
    }
    for seed, fvu in enumerate(fvus)
  ]  # fmt: skip
  summary = short_runs.table(rows)['a by 8']['b']
  low, high = stats.t.interval(
    0.95, 2, np.mean(fvus), np.std(fvus, ddof=1) / 3**0.5
  )
  assert summary['seeds'] == 3
  np.testing.assert_allclose(summary['validation_fvu'], 0.22, atol=1e-4)
  np.testing.assert_allclose(
    summary['validation_fvu_pm'], (high - low) / 2, atol=1e-4
  )
  np.testing.assert_allclose(
    summary['test_fvu_pm'], 2 * summary['validation_fvu_pm'], atol=2e-4
  )
  assert 'test_fvu_pm' not in short_runs.table(rows[:1])['a by 8']['b']


def test_a_change_is_against_the_same_seed():
  def row(variant, seed, fvu):
    return {
      'shape': 'a', 'batch_size': 8, 'variant': variant, 'seed': seed,
      'validation_fvu': fvu, 'test_fvu': fvu, 'train_silent': 0.0,
    }  # fmt: skip

  rows = [row('defaults', seed, fvu) for seed, fvu in enumerate((0.2, 0.4))]
  # In another order, and with a seed that the defaults lack.
  rows += [row('b', 1, 0.44), row('b', 0, 0.22), row('b', 5, 9.0)]
  summary = short_runs.table(rows)['a by 8']
  assert (summary['b']['change'], summary['b']['change_pm']) == (0.1, 0.0)
  assert summary['defaults']['change'] == 0
  # Control: the means of all seeds say another thing.
  assert summary['b']['test_fvu'] / summary['defaults']['test_fvu'] > 5
  assert 'change' not in short_runs.table(rows[2:])['a by 8']['b']


def rated(shape, seed, best, factors=(0.5, 1, 2)):
  """Lines whose ln FVU is a parabola of ln rate."""
  names = {0.5: 'half the rate', 1: 'defaults', 2: 'twice the rate'}
  names[1.4] = '1.4 times the rate'
  return [
    {
      'shape': shape, 'batch_size': 8, 'variant': names[factor], 'seed': seed,
      'validation_fvu': 0.2 * np.exp(np.log(factor / best) ** 2 / 10),
    }
    for factor in factors
  ]  # fmt: skip


def test_the_best_rate_is_the_least_of_each_seed_s_parabola():
  lines = (
    rated(SHAPE, 0, 1.1)
    + rated(SHAPE, 1, 1.3)
    + rated('2048:16:200000', 0, 0.8)
  )
  other = {'variant': 'no warm-up', 'validation_fvu': 0.0}
  # The best of it is at an end.
  lines += [lines[0] | other, *rated('4096:32:200000', 0, 2.5)]
  ratios = short_runs.best_rates(lines)
  assert set(ratios) == {
    f'{SHAPE} by 8', '2048:16:200000 by 8', 'all shapes',
  }  # fmt: skip
  a, b, whole = ratios.values()
  np.testing.assert_allclose(a['ratio'], (1.1 * 1.3) ** 0.5, rtol=1e-9)
  np.testing.assert_allclose(b['ratio'], 0.8, rtol=1e-9)
  assert (a['of'], b['of'], whole['of']) == (2, 1, 2)
  assert 'interval' not in b
  # Student's, of the logarithms, over the means of the shapes.
  logs = np.log([a['ratio'], b['ratio']])
  half = 12.7062 * abs(logs[0] - logs[1]) / 2
  np.testing.assert_allclose(
    np.log(whole['interval']), [logs.mean() - half, logs.mean() + half],
    rtol=1e-4,
  )  # fmt: skip
  # The nearest rates count: a far one that does not learn changes nothing.
  far = rated(SHAPE, 0, 1.1, (0.5, 1, 1.4)) + rated(SHAPE, 0, 1.1, (2,))
  far[-1]['validation_fvu'] = 0.7
  np.testing.assert_allclose(
    short_runs.best_rates(far)[f'{SHAPE} by 8']['ratio'], 1.1, rtol=1e-9
  )
