"""Explanations on the page: in the list, the search and a latent's view."""

import numpy as np
import pytest

from sae_jax.browser import index
from tests.support import synthetic_features
from tests.support.browser.pages import (
  listed,
  open_latent,
  search,
  serve,
  visit,
)

TEXTS = {
  3: 'Names of the Ships at sea',
  10: "<img src=x onerror=alert('said')>",
  11: 'ships in harbour, or at night',
}
SCORES = {3: (0.91, 0.85, 0.95), 10: (0.4, 0.3, 0.55)}


def line(latent):
  score = SCORES.get(latent)
  return {
    'explanation': TEXTS.get(latent),
    'score': score and {'balanced_accuracy': list(score)},
    'controls': {'other': score and {'balanced_accuracy': [0.52, 0.4, 0.6]}},
  }


@pytest.fixture(scope='module')
def url(made, tmp_path_factory):
  out = tmp_path_factory.mktemp('explained')
  explained = {latent: line(latent) for latent in (3, 10, 11, 12)}
  synthetic_features.build(
    *made, out, index.BrowseConfig(title='Explained'), explained
  )
  with serve(out) as url:
    yield url


def test_a_latent_has_its_explanation_and_score(page):
  open_latent(page, 3)
  box = page.locator('.feature .explained')
  assert box.locator('.lead').inner_text() == TEXTS[3]
  text = box.inner_text()
  assert 'balanced accuracy 0.910 (0.850 – 0.950)' in text
  assert 'by another latent’s explanation 0.520' in text
  # As text, not as a picture.
  open_latent(page, 10)
  assert page.locator('.explained .lead').inner_text() == TEXTS[10]
  assert page.locator('.explained img').count() == 0
  open_latent(page, 11)
  assert 'balanced' not in page.locator('.explained').inner_text()
  open_latent(page, 12)
  assert page.locator('.explained').count() == 0


def test_explanations_are_searched_and_listed(page, made):
  assert search(page, 'ships', 'said') == [
    n for n in listed(page) if n in (3, 11)
  ]
  assert sorted(search(page, 'ships at', 'said')) == [3, 11]
  assert search(page, '"Ships at sea"', 'said') == [3]
  # A short word is a whole one.
  assert search(page, 'ha', 'said') == []
  assert {3, 11} <= set(search(page, 'ships', 'both'))
  assert not {3, 11} & set(search(page, 'ships', 'top'))
  search(page, 'ships', 'said')
  row = page.locator('#rows [data-latent="3"]')
  assert TEXTS[3] in row.inner_text()


def test_latents_are_sorted_by_score(page, made):
  alive = set(np.flatnonzero(made[0]['count']).tolist())
  assert {3, 10} <= alive
  page.select_option('#sort', 'score')
  # Before the list is scrolled through.
  assert 'score 0.910' in page.locator('#rows [data-latent="3"]').inner_text()
  assert listed(page)[:2] == [3, 10]
  page.click('#direction')
  assert listed(page)[:2] == [10, 3]


def test_control_a_page_without_explanations_offers_none(
  made, chromium, tmp_path
):
  synthetic_features.build(*made, tmp_path)
  with serve(tmp_path) as url, visit(chromium, url) as (page, problems):
    page.wait_for_selector('#rows .preview .token')
    assert page.locator('#sort [value=score]').count() == 0
    assert page.locator('#where [value=said]').count() == 0
    assert problems == []
