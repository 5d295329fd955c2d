"""Pages of unusual autoencoders: the figures at the edges of their formulas."""

import numpy as np
import pytest

from sae_jax.features.columns import MOMENTS
from tests.support import synthetic_features
from tests.support.browser.pages import open_latent, serve, visit

NAN = float('nan')


def changed(made, **arrays):
  return {name: array.copy() for name, array in made[0].items()} | arrays


def all_dense(made):
  """Every live latent fires on every token."""
  count = made[0]['count']
  everywhere = np.where(count > 0, 8000, 0)
  density = (everywhere / 8000).astype(np.float32)
  return changed(made, count=everywhere, density=density), made[1]


def none_live(made):
  features = changed(made)
  for name in ('count', 'density', 'hist_counts'):
    features[name][:] = 0
  for kind in ('top', 'random'):
    features[f'{kind}_peak'][:] = -1
  return features, made[1]


def not_finite(made):
  features = changed(made)
  for name in MOMENTS:
    features[name][:] = np.nan
  report = dict.fromkeys(made[1], NAN) | {'subject': 'toy', 'probes': {}}
  score = {'best_latent': 1, 'test_auc': 0.9, 'test_auc_low': NAN}
  report['probes']['task'] = {'latent': score | {'test_auc_high': NAN}}
  return features, report


def extreme(made):
  features = changed(made)
  live = features['count'] > 0
  for name in ('max', 'mean'):
    features[name][live] = 3e38
  features['std'][live] = 1e-44
  features['hist_edges'] = np.geomspace(1e-44, 3e38, 41).astype(np.float32)
  features['hist_counts'][live] = 10**15
  report = {'kl': -1e-300, 'l0': 1e300, 'n_tokens': 10**18, 'k': 10**18}
  return features, made[1] | report


def no_axis(made):
  """An edge of a bin has no place on a logarithmic axis."""
  features = changed(made, hist_edges=np.linspace(0, 9, 41, dtype=np.float32))
  features['hist_counts'][:] = features['count'][:, None]
  return features, made[1]


def one_latent(made):
  """One that has no neighbour and is the only one in its list."""
  features = changed(made)
  alive = np.flatnonzero(features['count'])[:1]
  features = {
    name: array if name == 'hist_edges' else array[alive]
    for name, array in features.items()
  }
  features['latent_ids'][:] = 0
  features['neighbour_ids'][:] = -1
  return features, {'probes': {}}


BARS = """bars => bars.map((bar) => [parseInt(bar.ariaLabel.replace(',', '')),
  bar.ariaLabel.replace(/.* to /, '')])"""
# Places that are no numbers, in texts and in drawings.
UNREADABLE = """() => [...document.querySelectorAll('svg *')].flatMap((node) =>
  [...node.attributes]).map((one) => one.value)
  .concat(document.body.innerText)
  .flatMap((text) => text.match(/NaN|undefined|Infinity|∞|– – –|\\[object/g)
    ?? [])"""


@pytest.mark.parametrize(
  'edit', [all_dense, none_live, not_finite, extreme, no_axis, one_latent]
)
def test_a_page_is_shown_whole(made, chromium, tmp_path, edit):
  features, report = edit(made)
  synthetic_features.build(features, report, made[2], tmp_path)
  with serve(tmp_path) as url, visit(chromium, url) as (page, problems):
    page.wait_for_selector('.overview .actions')
    page.wait_for_selector('#rows .facts')
    assert page.evaluate(UNREADABLE) == []
    if edit is all_dense:
      live = int((features['count'] > 0).sum())
      bars = page.locator('.overview .bar').evaluate_all(BARS)
      assert bars == [[live, '100 % of tokens']]
    if edit is not_finite:
      assert page.locator('[data-metric=delta_ce]').inner_text() == '–'
      # No interval stands below a figure without one.
      assert page.locator('.tiles small, td small').count() == 0
    # Random: of the live ones, or where none lives of all.
    page.keyboard.press('r')
    page.wait_for_selector('.feature .columns:not([aria-busy])')
    latent = int(np.argmax(features['count']))
    open_latent(page, int(features['latent_ids'][latent]))
    page.wait_for_timeout(50)
    assert page.evaluate(UNREADABLE) == []
    assert page.locator('main [role=alert]').count() == 0
    assert problems == []


def test_one_part_that_fails_stops_no_other(made, chromium, tmp_path):
  report = made[1] | {'probes': 'none', 'n_tokens': {}, 'site': 3}
  synthetic_features.build(made[0], report, made[2], tmp_path)
  with serve(tmp_path) as url, visit(chromium, url) as (page, problems):
    alert = page.locator('.overview [role=alert]')
    alert.wait_for()
    assert alert.count() == 1
    assert 'Probes' in alert.inner_text()
    assert 'Run sae-browse again' in alert.inner_text()
    assert page.locator('.overview .bar').count() > 5
    assert page.locator('[data-metric=nmse]').inner_text() == '0.183'
    page.wait_for_selector('#rows .preview .token')
    assert problems == []
