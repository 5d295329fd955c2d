"""The page in a real browser, over an index of synthetic features."""

import contextlib
import functools
import http.server
import json
import os
import re
import shutil
import threading

import numpy as np
from playwright import sync_api
import pytest
import synthetic_features

from sae_jax.browser import index

pytestmark = pytest.mark.slow

N_LATENTS = 120
FLAGS = (
  '--no-sandbox',
  '--disable-gpu',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
)
HOSTILE_LATENT = synthetic_features.N_HOSTILE_LATENT

LISTED = """async () => {
  const scroller = document.getElementById('scroller');
  const total = parseInt(document.getElementById('rows').style.height) / 62;
  const found = [];
  for (let top = 0; top <= total * 62; top += 500) {
    scroller.scrollTop = top;
    await new Promise(requestAnimationFrame);
    await new Promise(requestAnimationFrame);
    for (const row of document.querySelectorAll('#rows li')) {
      found[row.ariaPosInSet - 1] = Number(row.dataset.latent);
    }
  }
  return found;
}"""

CONTEXTS = """(kind) => [...document.querySelectorAll(
  `.examples.${kind} .context`)].map((line) => ({
    texts: [...line.children].map((token) => token.textContent),
    colors: [...line.children].map(
      (token) => getComputedStyle(token).backgroundColor),
    peaks: [...line.children].flatMap((token, i) =>
      getComputedStyle(token).boxShadow === 'none' ? [] : [i]),
  }))"""


@pytest.fixture(scope='module')
def made():
  return synthetic_features.make(
    n_latents=N_LATENTS, n_examples=5, window=32, n_tokens=8000
  )


@pytest.fixture(scope='module')
def folder(made, tmp_path_factory):
  out = tmp_path_factory.mktemp('page')
  index.build_index(*made, out, index.BrowseConfig(title='A test of features'))
  return out


@contextlib.contextmanager
def serve(folder):
  class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
      pass

  handler = functools.partial(Quiet, directory=str(folder))
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f'http://127.0.0.1:{server.server_port}/'
  server.shutdown()
  server.server_close()


@pytest.fixture(scope='module')
def url(folder):
  with serve(folder) as url:
    yield url


@pytest.fixture(scope='module')
def chromium():
  path = shutil.which('chromium')
  if path is None:
    reason = 'no chromium on the PATH: apt-get install chromium'
    if os.environ.get('CI'):
      pytest.fail(reason)
    pytest.skip(reason)
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
    yield browser
    browser.close()


@contextlib.contextmanager
def visit(chromium, url, **context):
  """A page, and the list of all that a sound page never does."""
  context.setdefault('viewport', {'width': 1400, 'height': 800})
  opened = chromium.new_context(**context)
  page = opened.new_page()
  page.set_default_timeout(10_000)
  problems = []

  def on_dialog(dialog):
    problems.append(f'dialog {dialog.message}')
    dialog.dismiss()

  def on_console(message):
    if message.type in ('error', 'warning'):
      problems.append(f'console {message.text}')

  def on_request(request):
    if not request.url.startswith(url.split('#')[0].rsplit('/', 1)[0]):
      problems.append(f'request {request.url}')

  page.on('dialog', on_dialog)
  page.on('console', on_console)
  page.on('pageerror', lambda error: problems.append(f'error {error}'))
  page.on('request', on_request)
  page.goto(url)
  yield page, problems
  opened.close()


@pytest.fixture
def page(chromium, url):
  with visit(chromium, url) as (page, problems):
    page.wait_for_selector('#rows .preview .token')
    yield page
    page.wait_for_timeout(50)
    assert problems == []


def listed(page):
  return page.evaluate(LISTED)


def open_latent(page, latent):
  page.evaluate('(latent) => { location.hash = `#/latent/${latent}` }', latent)
  page.wait_for_selector(
    f'.feature[data-latent="{latent}"] .columns:not([aria-busy])'
  )


def search(page, text, where='both'):
  page.select_option('#where', where)
  page.fill('#search', text)
  page.dispatch_event('#where', 'change')
  return listed(page)


def alphas(colors):
  """Opacities of computed colours; opaque ones are written rgb(r, g, b)."""
  found = [re.findall(r'[\d.]+', color) for color in colors]
  return np.array([float(f[3]) if len(f) == 4 else 1.0 for f in found])


def expected_order(features, key, ascending):
  """Live latents by (value, number); silent ones behind, by number."""
  values = features['latent_ids' if key == 'latent' else key].astype(float)
  keys = values if ascending else -values
  silent = features['count'] == 0
  if key == 'latent':
    silent = np.zeros_like(silent)
  keys = np.where(silent, 0, keys)
  return np.lexsort((features['latent_ids'], keys, silent)).tolist()


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


def test_search_finds_what_a_scan_finds(page, made):
  for where in ('top', 'votes', 'both'):
    for text in ('ten', 'the', 'ing'):
      expected = with_token(made, lambda t, s=text: s in t.lower(), where)
      assert sorted(search(page, text, where)) == expected, (text, where)
      assert expected
  short = with_token(made, lambda t: t.strip().lower() == 'of', 'both')
  assert sorted(search(page, 'of')) == short
  exact = with_token(made, lambda t: t.strip() == 'The', 'both')
  assert sorted(search(page, '"The"')) == exact
  assert exact != with_token(made, lambda t: 'the' in t.lower(), 'both')
  both = set(with_token(made, lambda t: 'the' in t.lower(), 'both'))
  both &= set(with_token(made, lambda t: 'ten' in t.lower(), 'both'))
  assert sorted(search(page, 'the ten')) == sorted(both)
  assert search(page, 'nowhere to be found') == []
  assert page.text_content('#found') == f'0 of {N_LATENTS} latents'


def test_search_marks_the_token_it_found(page):
  search(page, 'minister', 'votes')
  marked = page.locator('#rows .chip.marked').all_text_contents()
  assert marked and set(marked) == {'·Minister'}


def test_search_jumps_to_a_number(page):
  for text, latent in (('#33', 33), ('57', 57)):
    page.fill('#search', text)
    page.press('#search', 'Enter')
    page.wait_for_selector(f'.feature[data-latent="{latent}"]')


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


def ordinary_latents(made, wanted):
  """Live latents whose contexts hold no hostile token."""
  features, _, _ = made
  lowest = np.where(
    features['top_tokens'] < 0, 9999, features['top_tokens']
  ).min((1, 2))
  lowest = np.minimum(
    lowest,
    np.where(
      features['random_tokens'] < 0, 9999, features['random_tokens']
    ).min((1, 2)),
  )
  clean = (lowest >= len(synthetic_features.HOSTILE)) & (features['count'] > 20)
  assert clean.sum() >= wanted
  return np.flatnonzero(clean)[:wanted].tolist()


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
    chips = page.locator(f'.votes.{way} .chip').all_text_contents()
    for chip, token in zip(chips, features[f'vote_{way}_ids'][latent]):
      text = vocabulary[token]
      if token >= len(synthetic_features.HOSTILE) and text.strip():
        assert chip == ('·' + text[1:] if text[0] == ' ' else text)
    widths = page.locator(f'.votes.{way} .fill').evaluate_all(
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


FOREIGN = """() => [...document.querySelectorAll(
  'img, style, iframe, object, embed, body script, [onload], [onerror], b i')]
  .map((node) => node.outerHTML)"""


def walk_hostile(page):
  """Shows the hostile tokens; returns their text and elements they became."""
  open_latent(page, HOSTILE_LATENT)
  page.keyboard.press('w')
  spans = page.locator('.context .token')
  for i in range(0, spans.count(), 3):
    spans.nth(i).dispatch_event('pointerover')
  foreign = page.evaluate(FOREIGN)
  texts = spans.all_text_contents()
  for text in ('<img', 'script', 'onload', 'style', '&lt'):
    search(page, text)
    foreign += page.evaluate(FOREIGN)
    texts += page.locator('#rows .chip').all_text_contents()
    texts += page.locator('#rows .token').all_text_contents()
  page.wait_for_timeout(100)
  return ' '.join(texts), foreign


def test_hostile_tokens_stay_text(page):
  shown, foreign = walk_hostile(page)
  assert foreign == []
  assert "<img src=x onerror=alert('token')>" in shown
  assert '</script><script>alert(1)</script>' in shown
  assert '&lt;b&gt;' in shown
  for hidden in ('\u202e', '\u200f', '\x00', '\x1b', '\u2028', '\r'):
    assert hidden not in shown
  assert '⟨202E⟩right to left' in shown
  assert page.locator('#home').is_visible()


@pytest.mark.parametrize('policy', [True, False])
def test_hostile_check_sees_an_injection(folder, tmp_path, chromium, policy):
  """A page that writes tokens as HTML is caught; its policy still blocks."""
  out = tmp_path / 'planted'
  shutil.copytree(folder, out)
  for name in ('tokens.js', 'dom.js'):
    text = (out / name).read_text()
    planted = text.replace('.textContent = ', '.innerHTML = ')
    (out / name).write_text(planted)
  assert '.innerHTML = visible(text)' in (out / 'tokens.js').read_text()
  html = (out / 'index.html').read_text()
  if not policy:
    html = re.sub(r'<meta http-equiv="Content-Security[^>]*>', '', html)
    (out / 'index.html').write_text(html)
  with serve(out) as url, visit(chromium, url) as (page, problems):
    if policy:
      page.wait_for_timeout(500)
      assert any('TrustedHTML' in p for p in problems)
      assert page.evaluate(FOREIGN) == []
    else:
      page.wait_for_selector('#rows .token', state='attached')
      page.evaluate(f"location.hash = '#/latent/{HOSTILE_LATENT}'")
      page.wait_for_selector('.context', state='attached')
      page.wait_for_timeout(200)
      assert page.evaluate(FOREIGN) != []
      assert any(p.startswith('dialog') for p in problems)
    dialogs = [p for p in problems if p.startswith('dialog')]
    assert bool(dialogs) == (not policy)


def test_requests_to_elsewhere_are_refused_and_seen(chromium, url):
  with visit(chromium, url) as (page, problems):
    page.wait_for_selector('#rows .token')
    assert problems == []
    refused = page.evaluate(
      "fetch('http://127.0.0.2:9/').then(() => false, () => true)"
    )
    assert refused
    assert any('Content Security Policy' in p for p in problems)


def test_deep_link_back_and_unknown(chromium, url):
  with visit(chromium, url + '#/latent/42') as (page, problems):
    page.wait_for_selector('.feature[data-latent="42"] .columns > *')
    assert page.title() == 'Latent 42 · A test of features'
    current = page.locator('#rows [aria-current=page]')
    assert current.get_attribute('href') == '#/latent/42'
    open_latent(page, 43)
    page.go_back()
    page.wait_for_selector('.feature[data-latent="42"]')
    page.evaluate("location.hash = '#/latent/99999'")
    page.wait_for_selector('text=There is no latent 99999')
    page.click('text=To the overview')
    page.wait_for_selector('.overview')
    assert page.title() == 'A test of features'
    assert problems == []


def test_keyboard(page, made):
  features, _, _ = made
  order = expected_order(features, 'density', False)

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


def test_next_and_random_stay_within_the_list(page, made):
  found = search(page, 'the', 'top')
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
    assert [float(text) for text in row[2:]] == [0.664, 0.707, 0.741, 0.512]

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


@pytest.mark.parametrize(
  'name, content, words',
  [
    ('meta.json', None, 'data/meta.json is missing (HTTP 404)'),
    ('columns.json', None, 'data/columns.json is missing'),
    ('columns.json', '{"latent": [1, 2', 'data/columns.json is not valid JSON'),
    ('columns.json', '{"latent": [1]}', '1 entries of latent, not 120'),
    ('columns.json', '{}', 'not what this page expects'),
    ('vocabulary.json', '[]', 'has 0 tokens, not'),
    ('meta.json', '{"format_version": 99}', 'has format 99'),
    ('meta.json', 'null', 'has format undefined'),
  ],
)
def test_broken_data_is_named(folder, tmp_path, chromium, name, content, words):
  out = tmp_path / 'broken'
  shutil.copytree(folder, out)
  (out / 'data' / name).unlink()
  if content is not None:
    (out / 'data' / name).write_text(content)
  with serve(out) as url, visit(chromium, url) as (page, _):
    page.wait_for_selector('main [role=alert]')
    message = page.locator('main [role=alert]').inner_text()
    assert words in message
    assert 'Run sae-browse again' in message
    assert not page.locator('#index').is_visible()


def test_missing_shard_can_be_tried_again(folder, tmp_path, chromium):
  out = tmp_path / 'gap'
  shutil.copytree(folder, out)
  shard = out / 'data' / 'features' / '00001.json'
  kept = shard.read_text()
  shard.unlink()
  with serve(out) as url, visit(chromium, url + '#/latent/70') as (page, _):
    page.wait_for_selector('text=data/features/00001.json is missing')
    shard.write_text(kept)
    page.click('text=Try again')
    page.wait_for_selector('.feature .context')
  shard.write_text(json.dumps(json.loads(kept)[::-1]))
  with serve(out) as url, visit(chromium, url + '#/latent/70') as (page, _):
    page.wait_for_selector('text=does not hold latent 70')


def test_opened_as_a_file_it_asks_for_a_server(folder, chromium):
  with visit(chromium, f'file://{folder}/index.html') as (page, _):
    page.wait_for_timeout(1600)
    boot = page.locator('#boot')
    assert 'python -m http.server' in boot.inner_text()
    assert float(boot.evaluate('node => getComputedStyle(node).opacity')) == 1
