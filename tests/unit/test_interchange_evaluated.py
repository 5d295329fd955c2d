"""The table of SAELens's metrics and sae-probe's, of numbers that are given."""

import pytest

from experiments.interchange import evaluated

REPORT = {
  'l0': 16.0,
  'fvu': 0.25,
  'nmse': 0.3,
  'cosine': 0.9,
  'norm_ratio': 0.8,
  'dead_fraction': 0.125,
}
CONSTANT = 20.0


def metrics(**changes):
  return {
    'l0': 16.0,
    'explained_variance': 0.75,
    'explained_variance_legacy': 0.5,
    'mse': 6.0,
    'cossim': 0.9,
    'l2_ratio': 0.8,
    'share of feature_density 0': 0.125,
  } | changes


def compared(preprocessing='none', control=None, **changes):
  theirs = {'a': metrics(**changes)}
  for name in evaluated.CONTROLS:
    theirs[f'a: {name}'] = metrics(explained_variance=0.7)
  if control:
    theirs[f'a: {control}'] = metrics()
  return evaluated.compared('a', preprocessing, theirs, REPORT, CONSTANT)


def test_what_has_one_definition_agrees():
  rows = compared()
  assert evaluated.wrong(rows) == []
  assert [row['theirs'] for row in rows if row['why_not'] == ''] == [
    'l0', 'explained_variance', 'mse', 'cossim', 'l2_ratio',
    'share of feature_density 0',
  ]  # fmt: skip
  table = evaluated.lines(rows)
  assert len(table) == 1 + 1 + 7 + 2 * 3
  assert any('mse, nmse x its constant' in line for line in table)


@pytest.mark.parametrize(
  'changes', [{'explained_variance': 0.7502}, {'l0': 15.9}, {'mse': 6.1}]
)
def test_control_what_differs_is_found(changes):
  (row,) = evaluated.wrong(compared(**changes))
  assert row['theirs'] in changes


@pytest.mark.parametrize('control', evaluated.CONTROLS)
def test_control_a_control_that_agrees_is_found(control):
  (row,) = evaluated.wrong(compared(control=control))
  assert row['of'] == f'a: {control}'


def test_what_is_measured_of_each_token_need_not_agree():
  other = {'explained_variance': 0.6, 'mse': 9.0, 'cossim': 0.5}
  rows = compared('center_unit_norm', **other)
  assert evaluated.wrong(rows) == []
  # Nor would it be seen that a control agrees.
  assert not [row for row in rows if row['why_not'] == 'control']
  assert len(evaluated.wrong(compared('dataset', **other))) == 2
