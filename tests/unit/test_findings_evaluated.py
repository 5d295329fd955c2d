"""Findings of evaluation: what is probed, what is kept of it, effects."""

import math
import pathlib

import numpy as np
import pytest

from experiments.findings import cells, effects, evaluated
from experiments.findings import measure as findings
from experiments.findings.pairs import Budget, run

BUDGET = Budget(n_latents=128, k=8, n_tokens=2000, batch_size=64, seeds=2)
SHAPES = ['n 32, k 2', 'n 32, k 8', 'n 128, k 2', 'n 128, k 8']


@pytest.fixture
def study(store, tmp_path):
  return cells.Study(
    store,
    str(tmp_path / 'runs'),
    str(tmp_path / 'cells.jsonl'),
    str(tmp_path / 'evaluations.jsonl'),
  )


def canned(monkeypatch, of_config):
  """Runs have the figures that a function of their config says."""
  asked = []

  def lines(study, configs, suite):
    asked.append(suite)
    return {
      key: {
        'evaluations': of_config(config),
        'scores': {'test': {'l0': 12.0}},
        'failure': '',
      }
      for key, config in configs.items()
    }

  monkeypatch.setattr(evaluated, 'lines', lines)
  return asked


def test_an_evaluation_is_made_once_and_its_figures_are_kept(
  study, monkeypatch
):
  probed = []

  def probe(config, checkpoint, store, workdir, subject):
    probed.append(config.suite)
    assert pathlib.Path(checkpoint, 'config.json').exists()
    pathlib.Path(workdir).mkdir(parents=True)
    figure = {'of': {'trained': {'value': 0.25}, 'channels': {'value': None}}}
    return {
      'evaluations': {
        'n2g': {'figures': {'recall': figure}},
        'ablation': {'cannot': 'contexts are short'},
      }
    }

  monkeypatch.setattr(evaluated.report, 'probe', probe)
  monkeypatch.setattr(evaluated, '_subject', lambda store, site: None)
  configs = {'one': run(BUDGET, 1)}
  line = evaluated.lines(study, configs, ('n2g', 'ablation'))['one']
  assert (line['seed'], line['k'], line['kind']) == (1, 8, 'n2g+ablation')
  assert evaluated.value(line, 'n2g', 'recall') == 0.25
  assert math.isnan(evaluated.value(line, 'n2g', 'recall', 'channels'))
  assert math.isnan(evaluated.value(line, 'ablation', 'sparsity'))
  assert probed == [('quick', 'n2g', 'ablation')]
  assert evaluated.lines(study, configs, ('n2g', 'ablation'))['one'] == line
  assert len(probed) == 1
  # Another evaluation trains it again, as it is deleted.
  evaluated.lines(study, configs, ('refinement',))
  assert probed[1:] == [('quick', 'refinement')]
  folder = pathlib.Path(study.workdir) / 'evaluated'
  assert not list((folder / 'runs').iterdir())
  assert not list((folder / 'probes').iterdir())


def test_shrinkage_is_of_topk_and_of_relu_at_each_weight(monkeypatch):
  def of_config(config):
    shrunk = 0.2 if config.sae.activation == 'relu' else 0.01
    shrunk += 0.001 * config.seed
    return {'refinement': {'shrinkage': {'trained': shrunk}}}

  asked = canned(monkeypatch, of_config)
  of = evaluated.shrinkage(None, BUDGET)
  assert asked == [evaluated.OF_TOPK, evaluated.OF_RELU]
  topk, relu = of[:4], of[4:]
  assert [e.name for e in topk] == [f'TopK, {s}: smaller by' for s in SHAPES]
  np.testing.assert_allclose([e.mean for e in topk], 1.05)
  # 1 % is not 0 by these seeds.
  assert {e.verdict for e in topk} == {effects.NOT_FOUND}
  np.testing.assert_allclose([e.mean for e in relu], 20.05)
  assert {e.verdict for e in relu} == {effects.FOUND}
  assert relu[0].name == 'ReLU, n 32, L0 12: smaller by' and len(relu) == 4


def test_latents_are_compared_with_channels_and_random_directions(monkeypatch):
  def of_config(config):
    # With few active latents channels are better.
    better = 1 if config.sae.k == 8 else -1
    spread = 1 + 0.01 * config.seed
    return {
      'ablation': {
        'sparsity': {'trained': 0.2, 'channels': 0.2 + 0.1 * better * spread}
      },
      'probes': {
        'test_ce': {
          'trained': 0.5,
          'channel': 0.5 + 0.1 * better * spread,
          'random': 0.5 + 0.2 * spread,
        }
      },
      'n2g': {
        'recall': {'trained': 0.3 * spread},
        'precision': {'trained': 0.9},
      },
    }

  canned(monkeypatch, of_config)
  verdicts = [effects.NOT_FOUND, effects.FOUND] * 2
  sparser = evaluated.ablation(None, BUDGET)
  assert [e.verdict for e in sparser] == verdicts
  np.testing.assert_allclose(sparser[1].mean, 10.05)
  channel, random = np.split(np.array(evaluated.probes(None, BUDGET)), 2)
  assert [e.verdict for e in channel] == verdicts
  np.testing.assert_allclose([e.mean for e in random], 0.201)
  (worse, *_) = evaluated.patterns(None, BUDGET)
  assert worse.verdict == effects.NOT_FOUND
  np.testing.assert_allclose(worse.mean, -59.85)


def test_what_was_not_measured_cannot_be_told(monkeypatch):
  canned(monkeypatch, lambda config: {})
  of = evaluated.ablation(None, BUDGET)
  assert {e.verdict for e in of} == {effects.CANNOT_TELL}


def test_progressive_codes_are_read_at_four_times_k(monkeypatch):
  def lines(study, configs):
    return {
      key: {
        'fvu_at_k': {
          str(config.sae.k): 0.2,
          str(4 * config.sae.k): (0.1 if config.objective.multi_topk else 0.3)
          + 0.001 * config.seed,
        }
      }
      for key, config in configs.items()
    }

  monkeypatch.setattr(cells, 'lines', lines)
  of = evaluated.progressive(None, BUDGET)
  multi, single = of[:4], of[4:]
  np.testing.assert_allclose([e.mean for e in multi], 49.75)
  np.testing.assert_allclose([e.mean for e in single], -50.25)
  assert single[0].name == 'TopK, n 32, k 2: FVU lower at 4 k than at k, by'
  assert {e.verdict for e in single} == {effects.NOT_FOUND}


def test_every_finding_has_a_claim_and_what_measures_it():
  assert len({f.claim for f in findings.FINDINGS.values()}) == len(
    findings.FINDINGS
  )
  assert all(callable(f.measure) for f in findings.FINDINGS.values())
