"""Hostile tokens, foreign requests, broken data: nothing slips through."""

import json
import re
import shutil

import pytest

from tests.support import synthetic_features
from tests.support.browser.pages import open_latent, search, serve, visit

HOSTILE_LATENT = synthetic_features.N_HOSTILE_LATENT
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
  assert '↵↵········' in shown
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
  assert '.innerHTML = unit.lines[0]' in (out / 'tokens.js').read_text()
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


@pytest.mark.parametrize(
  'name, content, words',
  [
    ('meta.json', None, 'data/meta.json is missing (HTTP 404)'),
    ('columns.json', None, 'data/columns.json is missing'),
    ('columns.json', '{"latent": [1, 2', 'data/columns.json is not valid JSON'),
    ('columns.json', '{"latent": [1]}', 'latent has 1 entries, not 120'),
    ('columns.json', '{}', 'columns.json: latent is missing, not a list'),
    ('vocabulary.json', '[]', 'has 0 entries, not'),
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


def with_value(text, path, value):
  """JSON text with another value at a path of keys."""
  whole = json.loads(text)
  place = whole
  for key in path[:-1]:
    place = place[key]
  place[path[-1]] = value
  return json.dumps(whole)


LATENT = [6, 'top', 0]


@pytest.mark.parametrize(
  'name, path, value, words',
  [
    ('meta.json', ['n_features'], '120', 'n_features is "120"'),
    ('meta.json', ['report'], None, 'report is null, not a mapping'),
    ('meta.json', ['hist_edges'], {}, 'hist_edges is a mapping'),
    ('columns.json', ['max', 6], 'x', 'max[6] is "x", not a number or null'),
    ('columns.json', ['latent', 6], 7, 'has a latent twice'),
    ('columns.json', ['top', 6], 3, 'top[6] is 3, not a list'),
    ('columns.json', ['votes', 6, 0], 10**6, 'votes[6][0] is 1000000, not a'),
    ('vocabulary.json', [6], [1, 256], 'vocabulary.json[6][1] is 256, not a'),
    ('previews.json', ['tokens', 6], None, 'tokens[6] is null, not a list'),
    ('previews.json', ['percents', 6], [], 'percents[6] has 0 entries, not'),
    ('features/00000.json', [6, 'histogram', 2], -1, 'histogram[2] is -1'),
    ('features/00000.json', [*LATENT, 'peak'], 99, 'top[0].peak[0] is 99'),
    ('features/00000.json', [6, 'votes_up'], 'a', 'votes_up is "a", not a map'),
    ('features/00000.json', LATENT, None, 'top[0] is null, not a mapping'),
    ('features/00000.json', [7, 'effect', 'kl'], 'a', 'effect[0] is "a"'),
    ('features/00000.json', [7, 'effect', 'up'], [], 'effect.up is a list'),
    ('features/00000.json', [6, 'neighbours'], [], 'neighbours is a list'),
  ],
)
def test_wrong_kinds_are_named(folder, chromium, name, path, value, words):
  text = with_value((folder / 'data' / name).read_text(), path, value)
  with serve(folder) as url, visit(chromium, 'about:blank') as (page, problems):
    page.route(f'**/data/{name}*', lambda route: route.fulfill(body=text))
    place = path[0] if 'features' in name else 6
    page.goto(url + f'#/latent/{place}')
    alert = page.locator('[role=alert]:visible')
    alert.wait_for()
    assert f'data/{name}' in alert.inner_text()
    assert words in alert.inner_text()
    assert 'Run sae-browse again' in alert.inner_text()
    assert [p for p in problems if not p.startswith('request')] == []


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
    boot = page.locator('#boot')
    assert 'python -m http.server' in boot.inner_text()
    # It shows slowly.
    while float(boot.evaluate('node => getComputedStyle(node).opacity')) < 1:
      page.wait_for_timeout(50)
