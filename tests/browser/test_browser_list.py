"""The list of latents: order, filters, search."""

import numpy as np

from tests.support.browser.pages import (
  expected_order,
  listed,
  N_LATENTS,
  open_latent,
  search,
)


def test_list_sorts_by_each_key_as_numpy_does(page, made):
  features, _, _ = made
  orders = {}
  for key in ('max', 'mean', 'std', 'skew', 'latent', 'density'):
    page.select_option('#sort', key)
    first = key == 'latent'
    for ascending in (first, not first):
      orders[key, ascending] = listed(page)
      page.click('#direction')
    for ascending in (True, False):
      assert orders[key, ascending] == expected_order(features, key, ascending)
  assert len({tuple(order) for order in orders.values()}) == 12


def test_random_order_is_a_permutation_and_shuffles_again(page):
  page.select_option('#sort', 'random')
  once = listed(page)
  page.click('#direction')
  again = listed(page)
  assert sorted(once) == sorted(again) == list(range(N_LATENTS))
  assert once != again
  assert once != sorted(once)


def test_filters_keep_what_they_say(page, made):
  features, _, _ = made
  alive = np.flatnonzero(features['count'])
  page.check('#alive')
  assert sorted(listed(page)) == alive.tolist()
  low, high = 0.3, 1.1
  page.fill('#density-min', str(low))
  page.fill('#density-max', str(high))
  page.dispatch_event('#density-max', 'change')
  percents = 100 * features['density'].astype(float)
  inside = np.flatnonzero((percents >= low) & (percents <= high))
  assert 5 < len(inside) < len(alive)
  assert sorted(listed(page)) == inside.tolist()
  found = page.text_content('#found')
  assert found == f'{len(inside)} of {N_LATENTS} latents'
  page.click('#reset')
  assert len(listed(page)) == N_LATENTS


def with_token(made, matches, where):
  """Latents with a matching token in their top tokens or first votes."""
  features, _, vocabulary = made
  found = []
  for latent in range(N_LATENTS):
    tokens = set()
    if where in ('both', 'top'):
      for row, peak in zip(
        features['top_tokens'][latent], features['top_peak'][latent]
      ):
        tokens |= {int(row[peak])} if peak >= 0 else set()
    if where in ('both', 'votes'):
      tokens |= set(features['vote_up_ids'][latent, :5].tolist())
    if any(matches(vocabulary[t]) for t in tokens):
      found.append(latent)
  return found


def words(made, wanted):
  """Long words in the vocabulary that some latent peaks on, some votes for."""
  vocabulary = made[2]
  found = [t.strip().lower() for t in vocabulary if t.strip().isalpha()]
  found = [
    word
    for word in dict.fromkeys(found)
    if len(word) >= 3
    and with_token(made, lambda t, w=word: w in t.lower(), 'top')
    and with_token(made, lambda t, w=word: w in t.lower(), 'votes')
  ]
  assert len(found) >= wanted
  return found[:wanted]


def test_search_finds_what_a_scan_finds(page, made):
  chosen = words(made, 3)
  for where in ('top', 'votes', 'both'):
    for text in chosen:
      expected = with_token(made, lambda t, s=text: s in t.lower(), where)
      assert 0 < len(expected) < N_LATENTS
      assert sorted(search(page, text.upper(), where)) == expected
  short = with_token(made, lambda t: t.strip().lower() == 'of', 'both')
  assert sorted(search(page, 'of')) == short
  exact = with_token(made, lambda t: t.strip() == 'The', 'both')
  assert sorted(search(page, '"The"')) == exact
  assert exact != with_token(made, lambda t: 'the' in t.lower(), 'both')
  first, second = (
    set(with_token(made, lambda t, s=text: s in t.lower(), 'both'))
    for text in ('the', 'ing')
  )
  assert sorted(search(page, 'the  ing')) == sorted(first & second)
  assert first & second not in (first, second)
  assert search(page, 'nowhere to be found') == []
  assert page.text_content('#found') == f'0 of {N_LATENTS} latents'


def test_search_marks_the_token_it_found(page, made):
  word = words(made, 1)[0]
  for where in ('top', 'votes'):
    search(page, word, where)
    marked = page.locator('#rows .chip.marked').all_text_contents()
    assert marked and all(word in text.lower() for text in marked)
    plain = page.locator('#rows .chips .chip:not(.marked)').all_text_contents()
    assert plain == []


def test_search_jumps_to_a_number(page):
  for text, latent in (('#33', 33), ('57', 57)):
    page.fill('#search', text)
    page.press('#search', 'Enter')
    page.wait_for_selector(f'.feature[data-latent="{latent}"]')


def test_next_and_random_stay_within_the_list(page, made):
  densest = np.sort(made[0]['density'])[-12]
  page.fill('#density-min', str(100 * densest))
  page.dispatch_event('#density-min', 'change')
  found = listed(page)
  assert 2 < len(found) < N_LATENTS / 2
  open_latent(page, found[0])
  page.click('button[aria-label^=Next]')
  page.wait_for_selector(f'.feature[data-latent="{found[1]}"]')
  for _ in range(4):
    before = page.locator('.feature').get_attribute('data-latent')
    page.click('.feature button[aria-label^=Random]')
    page.wait_for_selector(f'.feature:not([data-latent="{before}"])')
    now = int(page.locator('.feature').get_attribute('data-latent'))
    assert now in found
