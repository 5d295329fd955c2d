"""Findings: what is trained for them, what is kept, effects and verdicts."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from experiments.findings import (
  baselines,
  cells,
  dead,
  effects,
  pairs,
  rates,
)
from experiments.findings import (
  measure as findings,
)
from experiments.findings.pairs import Budget
from sae_jax import errors
from sae_jax import store as store_lib
from sae_jax.sweeps import work

BUDGET = Budget(n_latents=64, k=4, n_tokens=2000, batch_size=64, seeds=2)


@pytest.fixture
def study(store, tmp_path):
  return cells.Study(
    store,
    str(tmp_path / 'runs'),
    str(tmp_path / 'cells.jsonl'),
    str(tmp_path / 'evaluations.jsonl'),
    'a machine',
  )


@pytest.mark.parametrize(
  ('values', 'verdict'),
  [
    ((1.0, 1.2, 0.9), effects.FOUND),
    ((0.1, 0.11, 0.12), effects.FOUND),
    ((-1.0, -1.2, -0.9), effects.NOT_FOUND),
    ((0.1, -0.1, 0.0), effects.NOT_FOUND),
    ((3.0, -1.0, 1.0), effects.CANNOT_TELL),
  ],
)
def test_a_claim_is_found_by_the_interval(values, verdict):
  effect = effects.above('name', '%', values, least=0.5)
  half = np.std(values, ddof=1) / 3**0.5 * stats.t.ppf(0.975, 2)
  np.testing.assert_allclose(
    [effect.mean, effect.low, effect.high],
    [np.mean(values), np.mean(values) - half, np.mean(values) + half],
    rtol=1e-9,
    atol=1e-12,
  )
  assert (effect.verdict, effect.seeds) == (verdict, 3)


@pytest.mark.parametrize(
  ('values', 'verdict'),
  [
    ((-0.51, -0.5, -0.48), effects.FOUND),
    ((-0.7, -0.4, -0.5), effects.CANNOT_TELL),
    ((-0.3, -0.31, -0.32), effects.NOT_FOUND),
  ],
)
def test_a_number_is_found_where_the_interval_holds_it_and_is_narrow(
  values, verdict
):
  assert effects.near('name', '', values, -0.5, 0.2).verdict == verdict


def test_a_run_is_trained_once_and_its_line_has_its_figures(
  study, store, monkeypatch
):
  config = pairs.run(BUDGET, 1)
  line = cells.lines(study, {'first': config})['first']
  assert (line['seed'], line['k'], line['n_latents']) == (1, 4, 64)
  assert not line['failure'] and line['machine'] == 'a machine'
  data = store_lib.open_store(store)
  assert line['silent_rows'] == data.n_train
  assert set(line['fvu_at_k']) == {'1', '2', '4', '8', '16'}
  # At its own k it is the run's FVU, but for the rows that make no whole batch.
  tokens = line['scores']['test']['tokens']
  assert tokens < line['fvu_at_k_rows'] == len(data.test_rows)
  by_k = {int(k): value for k, value in line['fvu_at_k'].items()}
  np.testing.assert_allclose(by_k[4], cells.fvu(line), rtol=0.02)
  assert by_k[2] > 1.05 * by_k[4]
  assert abs(cells.fvu(line, 'validation') / cells.fvu(line) - 1) > 1e-4
  # It is not trained again, and another config is.
  monkeypatch.setattr(work, 'work', lambda *_: 1)
  assert cells.lines(study, {0: config}) == {0: line}
  for other in (
    pairs.run(BUDGET, 2),
    pairs.run(BUDGET, 1, bias_init='mean'),
    cells.with_rate(config, 2.0),
  ):
    with pytest.raises(errors.UserError, match='1 runs are left: give the'):
      cells.lines(study, {0: other})


def canned(monkeypatch, of_config):
  """Runs have the scores that a function of their config says."""
  trained = []

  def lines(study, configs):
    trained.extend(configs.values())
    return {
      key: {
        'failure': '',
        'learning_rate': config.optimizer.learning_rate,
        'n_latents': config.sae.n_latents,
      }
      | of_config(config)
      for key, config in configs.items()
    }

  monkeypatch.setattr(cells, 'lines', lines)
  return trained


def scores(validation, test, l0=4.0):
  return {
    'scores': {
      'validation': {'fvu': validation, 'l0': l0},
      'test': {'fvu': test, 'l0': l0},
    }
  }


def distance(config, best):
  return math.log(config.optimizer.learning_rate / best) ** 2


def test_rates_go_on_until_the_best_has_worse_ones_on_both_sides(monkeypatch):
  def of_config(config):
    best = 0.9 if config.sae.k == 4 else 0.01
    # By test rows it would be another.
    return scores(distance(config, best), distance(config, 0.07))

  canned(monkeypatch, of_config)
  arms = {
    'high': pairs.run(BUDGET, 0, learning_rate=0.1),
    'low': pairs.run(BUDGET, 0, learning_rate=0.1, k=2),
  }
  swept = cells.rates(None, arms)
  assert set(swept['high']) == {0.5, 1, 2, 4, 8, 16}
  assert set(swept['low']) == {0.0625, 0.125, 0.25, 0.5, 1, 2}
  assert cells.best(swept['high']) == 8 and cells.best(swept['low']) == 0.125
  canned(monkeypatch, lambda config: scores(distance(config, 1e9), 1))
  with pytest.raises(errors.UserError, match='high is best at 128 times its'):
    cells.rates(None, {'high': arms['high']})


def test_where_no_rate_is_any_good_both_sides_are_tried(monkeypatch):
  def of_config(config):
    rate = config.optimizer.learning_rate
    # As where too many latents are active at rates that are too low.
    return scores(distance(config, 0.8) if rate > 0.35 else math.inf, 1.0)

  canned(monkeypatch, of_config)
  arm = {'arm': pairs.run(BUDGET, 0, learning_rate=0.1)}
  swept = cells.rates(None, arm)
  assert cells.best(swept['arm']) == 8
  assert set(swept['arm']) == {0.25, 0.5, 1, 2, 4, 8, 16}


def test_a_failed_run_is_never_the_best(monkeypatch):
  def of_config(config):
    failed = config.optimizer.learning_rate > 0.15
    return (
      {'failure': 'not finite'}
      if failed
      else scores(distance(config, 0.1), 1.0)
    )

  canned(monkeypatch, of_config)
  swept = cells.rates(None, {'arm': pairs.run(BUDGET, 0, learning_rate=0.1)})
  assert swept['arm'][2]['failure'] and cells.best(swept['arm']) == 1


def test_arms_are_compared_at_their_own_rates_on_test_rows(monkeypatch):
  def of_config(config):
    mean = config.sae.bias_init == 'mean'
    best = 0.2 if mean else 0.1
    test = (0.5 if mean else 0.4) + 0.001 * config.seed
    return scores(0.3 + distance(config, best), test + distance(config, best))

  trained = canned(monkeypatch, of_config)
  monkeypatch.setattr(cells.defaults, 'learning_rate', lambda config: 0.1)
  (effect,) = pairs.median(None, BUDGET)
  np.testing.assert_allclose(
    effect.mean, 100 * np.mean([1 - 0.4 / 0.5, 1 - 0.401 / 0.501])
  )
  assert effect.verdict == effects.FOUND
  # The other seed is trained at the best rates alone.
  of_second = {
    (c.sae.bias_init, round(c.optimizer.learning_rate, 3))
    for c in trained
    if c.seed == 1
  }
  assert of_second == {('mean', 0.2), ('median', 0.1)}


@pytest.mark.parametrize(
  ('measure', 'field'),
  [(pairs.projection, 'project_gradient'), (pairs.median, 'bias_init')],
)
def test_a_pair_differs_in_one_setting(monkeypatch, measure, field):
  trained = canned(
    monkeypatch, lambda c: scores(distance(c, 1.0), 1.0 + 0.1 * c.seed)
  )
  monkeypatch.setattr(cells.defaults, 'learning_rate', lambda config: 1.0)
  measure(None, BUDGET)
  flat = [cells.grid.config_lib.flat(config) for config in trained]
  differ = {name for name in flat[0] if len({f[name] for f in flat}) > 1}
  assert differ == {field, 'seed', 'order_seed', 'learning_rate'}


def test_average_and_last_weights_are_of_the_same_training(monkeypatch):
  def of_config(config):
    averaged = config.optimizer.ema_decay > 0
    good = averaged and config.optimizer.decay_steps == 0
    return scores(
      distance(config, 1.0), (0.8 if good else 1.0) + 0.01 * config.seed
    )

  canned(monkeypatch, of_config)
  monkeypatch.setattr(cells.defaults, 'learning_rate', lambda config: 1.0)
  constant, falls = pairs.average(None, BUDGET)
  assert constant.verdict == effects.FOUND and constant.mean > 10
  assert falls.verdict == effects.NOT_FOUND and falls.mean == 0


def test_multi_topk_is_read_at_every_k(monkeypatch):
  def of_config(config):
    better = 0.5 if config.objective.multi_topk else 1.0
    by_k = {str(k): 1 / k for k in cells.other_k(4)}
    by_k['16'] *= better
    by_k['4'] *= 2 - better + 0.01 * config.seed
    return scores(distance(config, 1.0), 1.0) | {'fvu_at_k': by_k}

  canned(monkeypatch, of_config)
  monkeypatch.setattr(cells.defaults, 'learning_rate', lambda config: 1.0)
  of = {effect.name: effect for effect in pairs.multi_topk(None, BUDGET)}
  assert list(of) == [f'read at k {k}: FVU lower by' for k in (1, 2, 4, 8, 16)]
  wide = of['read at k 16: FVU lower by']
  assert wide.mean == 50 and wide.verdict == effects.FOUND
  assert of['read at k 8: FVU lower by'].verdict == effects.NOT_FOUND
  assert of['read at k 4: FVU lower by'].mean < -45


def test_baselines_are_compared_at_equal_l0(monkeypatch):
  trained = []

  def of_config(config):
    trained.append(config)
    rate = distance(config, 0.2)
    if config.sae.activation == 'topk':
      k = config.sae.k
      return scores(1 / k + rate, 0.9 / k + rate, l0=k)
    # It gains with every active latent, as TopK does, and is a quarter worse,
    # with many latents two times worse.
    l0 = 0.6 / config.objective.sparsity_weight
    worse = 1.25 if config.sae.n_latents == 16 else 2.0
    worse += 0.01 * config.seed
    # The second penalty is the one that is nearest to TopK.
    worse += 0.1 * (config.objective.sparsity_weight != 0.05)
    return scores(worse / l0 + rate, 0.9 * worse / l0 + rate, l0=l0)

  canned(monkeypatch, of_config)
  monkeypatch.setattr(cells.defaults, 'learning_rate', lambda config: 0.1)
  small, large, more = baselines.relu(None, BUDGET)
  assert small.name.startswith('n 16:') and large.name.startswith('n 64:')
  relu = [c for c in trained if c.sae.activation == 'relu' and c.seed == 1]
  assert {c.objective.sparsity_weight for c in relu} == {0.05}
  assert {round(c.optimizer.learning_rate, 3) for c in relu} == {0.2}
  # L0 of 12, so TopK is trained with k 12: the gain is that of the factor.
  topk = [c for c in trained if c.sae.activation == 'topk' and c.seed == 1]
  assert {c.sae.k for c in topk} == {12}
  np.testing.assert_allclose(small.mean, 100 * (1 - 1 / 1.255), atol=0.1)
  np.testing.assert_allclose(large.mean, 100 * (1 - 1 / 2.005), atol=0.1)
  assert more.verdict == effects.FOUND
  np.testing.assert_allclose(more.mean, large.mean - small.mean)
  # Nothing is said of penalties that leave far too few.
  monkeypatch.setattr(baselines, 'RELU', ({'sparsity_weight': 50.0},) * 2)
  with pytest.raises(errors.UserError, match='relu is best at'):
    baselines.relu(None, BUDGET)


@pytest.mark.parametrize('slope', [-0.5, -1.0])
def test_the_exponent_is_that_of_the_best_rates(monkeypatch, slope):
  def of_config(config):
    # Not where any rate of the grid is.
    best = 0.13 * (config.sae.n_latents / 64) ** slope
    best *= 1 + 0.01 * config.seed * (config.sae.n_latents == 8)
    return scores(1 + distance(config, best), 1.0)

  canned(monkeypatch, of_config)
  monkeypatch.setattr(
    cells.defaults,
    'learning_rate',
    lambda config: 0.1 * (64 / config.sae.n_latents) ** 0.5,
  )
  (effect,) = rates.exponent(None, BUDGET)
  np.testing.assert_allclose(effect.mean, slope, atol=0.03)
  assert effect.verdict == (
    effects.FOUND if slope == -0.5 else effects.NOT_FOUND
  )


def test_what_each_remedy_takes_from_the_dead(monkeypatch):
  shares = {(0, 'independent'): 0.5, (0, 'transposed'): 0.1,
            (256, 'independent'): 0.3, (256, 'transposed'): 0.1}  # fmt: skip

  def of_config(config):
    share = shares[config.objective.k_aux, config.sae.encoder_init]
    return scores(1.0, 1.0) | {'silent': share + 0.01 * config.seed}

  trained = canned(monkeypatch, of_config)
  neither, both, auxk, start, beside_auxk, beside_start = dead.latents(
    None, BUDGET
  )
  np.testing.assert_allclose(
    [
      effect.mean
      for effect in (neither, both, auxk, start, beside_auxk, beside_start)
    ],
    [50.5, 10.5, 20, 40, 20, 0],
    atol=1e-9,
  )
  assert start.verdict == effects.FOUND
  assert beside_start.verdict == effects.NOT_FOUND
  flat = [cells.grid.config_lib.flat(config) for config in trained]
  differ = {name for name in flat[0] if len({f[name] for f in flat}) > 1}
  assert differ == {'k_aux', 'encoder_init', 'seed', 'order_seed'}
  assert {f['dead_after_tokens'] for f in flat} == {100}


def test_results_are_kept_by_finding_and_make_the_page(tmp_path, monkeypatch):
  effect = effects.above('FVU lower by', '%', (1.0, 1.1, 1.2), 0.5)
  made = []
  monkeypatch.setattr(
    findings,
    'FINDINGS',
    {
      name: findings.Finding(
        f'Claim {name}',
        lambda study, budget, name=name: made.append(name) or [effect],
      )
      for name in ('one', 'two')
    },
  )
  config = findings.FindingsConfig(
    findings=('two',),
    results=str(tmp_path / 'results.json'),
    page=str(tmp_path / 'page.md'),
  )
  findings.measure(config, 'store', 'workdir')
  findings.measure(
    dataclasses.replace(config, findings=('one',)), 'store', 'workdir'
  )
  assert made == ['two', 'one']
  text = (tmp_path / 'page.md').read_text()
  assert text.index('Claim one') < text.index('Claim two')
  assert '| | FVU lower by | 1.10 (0.85 to 1.35) % | found |' in text
  with pytest.raises(errors.UserError, match='no finding is called three'):
    findings.measure(
      dataclasses.replace(config, findings=('three',)), 'store', 'workdir'
    )
