"""The views of the page: latents, overview, keyboard, phone."""

import re

import numpy as np
import pytest

from tests.support import synthetic_features
from tests.support.browser.pages import (
  expected_order,
  listed,
  open_latent,
  ordinary_latents,
  visit,
)

CONTEXTS = """(kind) => [...document.querySelectorAll(
  `.examples.${kind} .context`)].map((line) => ({
    texts: [...line.children].map((token) => token.textContent),
    colors: [...line.children].map(
      (token) => getComputedStyle(token).backgroundColor),
    peaks: [...line.children].flatMap((token, i) =>
      getComputedStyle(token).boxShadow === 'none' ? [] : [i]),
  }))"""


def alphas(colors):
  """Opacities of computed colours; opaque ones are written rgb(r, g, b)."""
  found = [re.findall(r'[\d.]+', color) for color in colors]
  return np.array([float(f[3]) if len(f) == 4 else 1.0 for f in found])


def check_contexts(found, features, vocabulary, latent, kind):
  """What is wrong with the contexts shown, compared with the arrays."""
  wrong = []
  rows = np.flatnonzero(features[f'{kind}_peak'][latent] >= 0)
  if len(found) != len(rows):
    wrong.append(f'{len(found)} examples')
  for shown, row in zip(found, rows):
    tokens = features[f'{kind}_tokens'][latent, row]
    acts = features[f'{kind}_acts'][latent, row][tokens >= 0]
    texts = [vocabulary[t] for t in tokens[tokens >= 0]]
    seen = [
      re.sub('^ +$', lambda m: '·' * len(m[0]), text).replace('\n', '↵')
      for text in texts
    ]
    if shown['texts'] != seen:
      wrong.append(f'texts of example {row}')
    if len(shown['texts']) != len(seen):
      continue
    share = acts / features['max'][latent]
    expected = np.where(acts > 0, 0.08 + 0.77 * share, 0)
    if np.abs(alphas(shown['colors']) - expected).max() > 0.004:
      wrong.append(f'shading of example {row}')
    if shown['peaks'] != [features[f'{kind}_peak'][latent, row]]:
      wrong.append(f'peak of example {row}')
  return wrong


# Newlines whose next token is not further down and further left.
INDENTED = """() => [...document.querySelectorAll('.example.open .token')]
  .filter((token) => token.textContent === '↵' && token.nextSibling)
  .filter((token) => {
    const here = token.getClientRects()[0];
    const next = token.nextSibling.getClientRects()[0];
    return !(next.top > here.top + 10 && next.left < here.right);
  }).map((token) => token.nextSibling.textContent)"""


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_contexts_show_tokens_shaded_by_activation(made, chromium, url, scheme):
  features, _, vocabulary = made
  with visit(chromium, url, color_scheme=scheme) as (page, problems):
    page.wait_for_selector('#rows .token')
    for latent in ordinary_latents(made, 4):
      open_latent(page, latent)
      for kind in ('top', 'random'):
        found = page.evaluate(CONTEXTS, kind)
        wrong = check_contexts(found, features, vocabulary, latent, kind)
        assert wrong == [], (latent, kind)
    assert problems == []


def test_context_check_sees_defects(page, made):
  features, _, vocabulary = made
  latent = ordinary_latents(made, 1)[0]
  open_latent(page, latent)
  line = "document.querySelector('.examples.top .context')"
  for defect, words in (
    (
      f"{line}.querySelector('.peak').style.setProperty('--shade', 0.8)",
      'shad',
    ),
    (f"{line}.children[1].classList.add('peak')", 'peak'),
    (f"{line}.children[2].textContent += 's'", 'texts'),
    (f'{line}.parentNode.remove()', 'examples'),
  ):
    page.evaluate(defect)
    found = page.evaluate(CONTEXTS, 'top')
    wrong = check_contexts(found, features, vocabulary, latent, 'top')
    assert any(words in w for w in wrong), defect


def test_strongest_shade_keeps_text_readable(made, chromium, url):
  latent = ordinary_latents(made, 1)[0]
  for scheme in ('light', 'dark'):
    with visit(chromium, url, color_scheme=scheme) as (page, _):
      open_latent(page, latent)
      colors = page.evaluate("""() => {
        const peak = document.querySelector('.examples.top .peak');
        return [getComputedStyle(peak).color,
          getComputedStyle(peak).backgroundColor,
          getComputedStyle(document.body).backgroundColor];
      }""")
    ink, heat, paper = (
      np.array([float(v) for v in re.findall(r'[\d.]+', c)][:3]) for c in colors
    )
    alpha = alphas(colors[1:2])[0]
    contrast = sorted(
      luminance(c) + 0.05 for c in (ink, heat * alpha + paper * (1 - alpha))
    )
    assert contrast[1] / contrast[0] > 4.5, (scheme, colors)


def luminance(rgb):
  """Relative luminance of sRGB in 0..255 (WCAG 2.1)."""
  c = rgb / 255
  linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
  return linear @ [0.2126, 0.7152, 0.0722]


def test_figures_tooltips_and_histogram(page, made):
  features, _, vocabulary = made
  latent = ordinary_latents(made, 1)[0]
  open_latent(page, latent)
  count = int(features['count'][latent])
  shown = page.locator('[data-figure=count]').inner_text()
  assert shown.split() == [f'{count:,}', 'times']
  largest = float(page.locator('[data-figure=max]').inner_text())
  assert largest == pytest.approx(features['max'][latent], rel=6e-3)

  page.hover('.examples.top .peak')
  lines = page.locator('#tip > *').all_inner_texts()
  peak = features['top_peak'][latent, 0]
  token = features['top_tokens'][latent, 0, peak]
  text = vocabulary[token]
  assert lines[0] == ('·' + text[1:] if text.startswith(' ') else text)
  assert float(lines[1].split()[1]) == pytest.approx(
    features['top_acts'][latent, 0, peak], rel=6e-4
  )
  assert lines[3] == f'token {token}'

  bars = page.locator('.feature .chart .bar')
  total = 0
  for i in range(bars.count()):
    bars.nth(i).dispatch_event('pointerover')
    text = page.locator('#tip strong').inner_text()
    total += int(text.split()[0].replace(',', ''))
  assert total == features['hist_counts'][latent].sum() == count

  page.hover('.feature .term >> text=density')
  assert 'Share of the probed tokens' in page.locator('#tip').inner_text()


def test_votes_and_neighbours(page, made):
  features, _, vocabulary = made
  latent = ordinary_latents(made, 2)[1]
  open_latent(page, latent)
  for way in ('up', 'down'):
    votes = page.locator(f'.votes.{way}').first
    chips = votes.locator('.chip').all_text_contents()
    for chip, token in zip(chips, features[f'vote_{way}_ids'][latent]):
      text = vocabulary[token]
      if token >= len(synthetic_features.HOSTILE) and text.strip():
        assert chip == ('·' + text[1:] if text[0] == ' ' else text)
    widths = votes.locator('.fill').evaluate_all(
      'bars => bars.map((bar) => bar.getBoundingClientRect().width)'
    )
    logits = np.abs(features[f'vote_{way}_logits'][latent])
    np.testing.assert_allclose(
      np.array(widths) / widths[0], logits / logits[0], atol=0.03
    )
  near = page.locator('.near a')
  links = [near.nth(i).get_attribute('href') for i in range(near.count())]
  neighbours = features['neighbour_ids'][latent].tolist()
  assert links == [f'#/latent/{n}' for n in neighbours]
  near.nth(2).click()
  page.wait_for_selector(f'.feature[data-latent="{neighbours[2]}"]')


def test_effects_are_there_where_they_were_measured(page, made):
  features, _, _vocabulary = made
  measured = np.isfinite(features['effect_kl'])
  latents = ordinary_latents(made, 9)
  latent = next(n for n in latents if measured[n])
  open_latent(page, latent)
  text = page.locator('.effect p').inner_text()
  loss, kl = re.fullmatch(
    r'next tokens: loss ([+-][\d.]+) nats, KL ([\d.]+)', text
  ).groups()
  assert float(loss) == pytest.approx(features['effect_ce'][latent], rel=6e-3)
  assert float(kl) == pytest.approx(features['effect_kl'][latent], rel=6e-3)
  for way in ('up', 'down'):
    shown = page.locator(f'.effect ~ .votes.{way} .value').all_text_contents()
    np.testing.assert_allclose(
      [float(value.replace('−', '-').removesuffix(' %')) for value in shown],
      100 * features[f'effect_{way}_changes'][latent],
      rtol=0.06,
    )
  other = next(n for n in latents if not measured[n])
  open_latent(page, other)
  assert page.locator('.effect').count() == 0


def test_deep_link_back_and_unknown(chromium, url):
  with visit(chromium, url + '#/latent/42') as (page, problems):
    page.wait_for_selector('.feature[data-latent="42"] .columns > *')
    assert page.title() == 'Latent 42 · A test of features'
    current = page.locator('#rows [aria-current=page]')
    assert current.get_attribute('href') == '#/latent/42'
    open_latent(page, 43)
    page.go_back()
    page.wait_for_selector('.feature[data-latent="42"]')
    # As the search takes it.
    page.evaluate("location.hash = '#41'")
    page.wait_for_selector('.feature[data-latent="41"]')
    page.evaluate("location.hash = '#/latent/99999'")
    page.wait_for_selector('text=There is no latent 99999')
    page.click('text=To the overview')
    page.wait_for_selector('.overview')
    assert page.title() == 'A test of features'
    assert problems == []


def test_keyboard(page, made):
  features, _, _ = made
  order = expected_order(features, 'max', False)

  def at():
    return int(page.locator('.feature').get_attribute('data-latent'))

  def press(key, expected):
    page.keyboard.press(key)
    page.wait_for_selector(f'.feature[data-latent="{expected}"]')

  press('j', order[0])
  press('j', order[1])
  press('ArrowRight', order[2])
  press('k', order[1])
  press('ArrowLeft', order[0])
  seen = set()
  for _ in range(6):
    before = at()
    page.keyboard.press('r')
    page.wait_for_selector(f'.feature:not([data-latent="{before}"])')
    seen.add(at())
    assert features['count'][at()] > 0
  assert len(seen) > 2
  here = at()
  page.keyboard.press('/')
  page.keyboard.type('jkr w')
  assert page.input_value('#search') == 'jkr w'
  assert at() == here
  page.keyboard.press('Escape')
  page.keyboard.press('Escape')
  page.wait_for_selector('.overview')
  page.keyboard.press('?')
  assert page.locator('#keys').is_visible()
  page.keyboard.press('Escape')
  assert not page.locator('#keys').is_visible()


def test_contexts_open_and_line_up(page, made):
  latent = ordinary_latents(made, 1)[0]
  open_latent(page, latent)
  middles = """() => [...document.querySelectorAll('.context .peak')].map(
    (peak) => { const box = peak.getBoundingClientRect();
      return box.left + box.width / 2; })"""
  lined = page.evaluate(middles)
  assert max(lined) - min(lined) < 2
  heights = """() => [...document.querySelectorAll('.context')].map(
    (line) => line.clientHeight)"""
  flat = page.evaluate(heights)
  assert len(set(flat)) == 1
  page.click('.examples.top .toggle >> nth=1')
  opened = page.evaluate(heights)
  assert opened[1] > flat[1] and opened[0] == flat[0]
  page.click('#wrap')
  assert page.evaluate(INDENTED) == []
  assert sum(page.evaluate(heights)) > sum(opened)
  assert max(page.evaluate(middles)) - min(page.evaluate(middles)) > 20


def test_tokens_are_reached_by_keyboard(page, made):
  features, _, _ = made
  latent = ordinary_latents(made, 1)[0]
  open_latent(page, latent)
  page.focus('.examples.top .context >> nth=0')
  page.keyboard.press('ArrowRight')
  tokens = features['top_tokens'][latent, 0]
  peak = features['top_peak'][latent, 0]
  assert f'token {tokens[peak]}' in page.locator('#tip').inner_text()
  page.keyboard.press('ArrowLeft')
  assert f'token {tokens[peak - 1]}' in page.locator('#tip').inner_text()
  assert 'activation' in page.text_content('#live')
  page.keyboard.press('Enter')
  assert page.locator('.example.open').count() == 1
  assert f'latent/{latent}' in page.url


def test_silent_latent_says_so(page, made):
  features, _, _ = made
  latent = int(np.flatnonzero(features['count'] == 0)[0])
  open_latent(page, latent)
  assert 'did not fire' in page.locator('.empty').inner_text()
  assert page.locator('.context').count() == 0
  assert page.locator('.votes.up li').count() == 10


def test_overview_tells_the_report(page, made):
  features, report, _ = made
  for key in (
    'nmse',
    'fvu',
    'fvu_pca',
    'fvu_untrained',
    'l0',
    'delta_ce',
    'kl',
  ):
    shown = float(page.locator(f'[data-metric={key}]').inner_text())
    assert shown == pytest.approx(report[key], rel=6e-3)
  dead = page.locator('[data-metric=dead_fraction]').inner_text()
  assert float(dead.split()[0]) == pytest.approx(
    100 * report['dead_fraction'], rel=0.06
  )
  for task, probe in report['probes'].items():
    row = page.locator('tr', has_text=task).locator('td').all_inner_texts()
    assert row[0] == f'#{probe["latent"]["best_latent"]}'
    auc, low, _, high = row[1].split()
    assert float(auc) == pytest.approx(probe['latent']['test_auc'], abs=6e-4)
    assert float(low) < float(auc) < float(high)
    aucs = [score['test_auc'] for score in probe['controls'].values()]
    assert [float(text) for text in row[2:]] == aucs
  heads = page.locator('.overview thead th').all_inner_texts()
  assert heads[3:] == ['permuted', 'random', 'channel', 'pca', 'brand new']
  page.locator('.overview thead .term', has_text='channel').hover()
  tip = page.locator('#tip').inner_text()
  assert tip == (
    'AUC of a control. ' + report['control_definitions']['channel']
  )

  labels = page.locator('.overview .bar').evaluate_all(
    'bars => bars.map((bar) => bar.ariaLabel)'
  )
  counts = [int(label.split()[0]) for label in labels]
  assert sum(counts) == (features['count'] > 0).sum()
  tallest = int(np.argmax(counts))
  page.locator('.overview .bar').nth(tallest).click()
  assert abs(len(listed(page)) - counts[tallest]) <= 1


def test_every_control_has_a_name(page, made):
  nameless = """() => [...document.querySelectorAll(
    'button, input, select, a[href], [role=button], nav, aside, dialog')]
    .filter((node) => !(node.ariaLabel || node.textContent.trim()
      || node.labels?.length || node.getAttribute('aria-labelledby')))
    .map((node) => node.outerHTML)"""
  assert page.evaluate(nameless) == []
  open_latent(page, ordinary_latents(made, 1)[0])
  assert page.evaluate(nameless) == []
  page.evaluate("document.getElementById('reset').textContent = ''")
  assert len(page.evaluate(nameless)) == 1


def test_phone(chromium, url, made):
  latent = ordinary_latents(made, 1)[0]
  screen = {'width': 375, 'height': 700}
  with visit(chromium, url, viewport=screen) as (page, problems):
    page.wait_for_selector('.overview')
    wide = 'document.documentElement.scrollWidth'
    assert page.evaluate(wide) == 375
    page.click('text=Browse the list')
    row = page.locator('#rows li >> nth=3')
    row.click()
    page.wait_for_selector('.feature .columns:not([aria-busy])')
    assert not page.locator('#index').is_visible()
    open_latent(page, latent)
    assert page.evaluate(wide) == 375
    page.click('text=all latents')
    page.wait_for_selector('.overview')
    assert row.is_visible()
    assert page.evaluate('scrollY') > 100
    assert problems == []
