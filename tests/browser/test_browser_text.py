"""Characters of several tokens, and scripts that run from right to left."""

import re

import numpy as np
import pytest

from tests.support import synthetic_features
from tests.support.browser.pages import open_latent, serve, visit

# Each in pieces, as a tokenizer may cut it: text, or bytes of characters.
CHINESE = [b'a\xe6', b'\x88', b'\x91\xe4', b'\xbb\xac', '\\xe6', b'\xe6']
ARABIC = ['go ', 'ق', 'ر', 'أ', ' ', 'ك', b'\xd8', b'\xaa', '.']
CLUSTERS = ['e', '\u0301', ' ', '\u0301', '👩', '\u200d', '💻', 'z', '\u200d']
TEXTS = (CHINESE, ARABIC, CLUSTERS)


@pytest.fixture(scope='module')
def text_url(made, tmp_path_factory):
  """A page whose latents 0, 1, 2 have one context each: those of `TEXTS`."""
  features = {name: array.copy() for name, array in made[0].items()}
  vocabulary = list(made[2])
  features['count'][:3] = 1
  features['max'][:3] = 1
  for latent, text in enumerate(TEXTS):
    for kind in ('top', 'random'):
      features[f'{kind}_peak'][latent] = -1
      features[f'{kind}_peak'][latent, 0] = 1
      features[f'{kind}_tokens'][latent] = -1
      features[f'{kind}_acts'][latent] = 0
      ids = np.arange(len(text)) + len(vocabulary)
      features[f'{kind}_tokens'][latent, 0, : len(text)] = ids
      features[f'{kind}_acts'][latent, 0, [1, 2]] = 1, 0.5
    vocabulary += text
  out = tmp_path_factory.mktemp('text')
  synthetic_features.build(features, made[1], vocabulary, out)
  with serve(out) as url:
    yield url


@pytest.fixture
def text_page(chromium, text_url):
  with visit(chromium, text_url) as (page, problems):
    page.wait_for_selector('#rows .preview .token')
    yield page
    assert problems == []


LINE = '.examples.top .context'


def spans(page):
  return page.locator(f'{LINE} .token').all_text_contents()


def test_characters_are_joined_over_tokens(text_page):
  open_latent(text_page, 0)
  # What is no character is not spelled as text may be.
  assert spans(text_page) == ['a', '我', '们', '\\xe6', '⟨xE6⟩']
  shared = text_page.locator(f'{LINE} .token.shared')
  assert shared.all_text_contents() == ['我', '们']
  stripes = shared.first.evaluate('e => getComputedStyle(e).backgroundImage')
  inks = re.findall(r'rgba?\(240, 128, 24(?:, ([\d.]+))?\)', stripes)
  # A stripe for each of three tokens, which begins and ends with its ink.
  assert [float(ink or 1) for ink in inks] == pytest.approx(
    [0, 0, 0.85, 0.85, 0.465, 0.465], abs=0.01
  )
  shared.first.hover()
  lines = text_page.locator('#tip > *').all_inner_texts()
  assert [line.partition(' token')[0] for line in lines] == [
    '我',
    'a⟨xE6⟩',
    '⟨x88⟩',
    '⟨x91⟩⟨xE4⟩',
  ]
  assert 'not active' in lines[1]
  assert 'activation 1.000, 100 % of its max' in lines[2]
  assert 'activation 0.5000, 50 % of its max' in lines[3]
  # The outline is around what the peak's token is a part of.
  assert text_page.locator(f'{LINE} .peak').all_text_contents() == ['我']
  preview = text_page.locator('#rows li[data-latent="0"] .preview')
  assert preview.inner_text() == 'a我们\\xe6'


def test_right_to_left_runs_are_one(text_page):
  open_latent(text_page, 1)
  line = text_page.locator(LINE).first
  assert line.inner_text() == 'go قرأ·كت.'
  assert line.locator('.rtl').all_inner_texts() == ['قرأ·كت.']
  lefts = """line => [...line.querySelectorAll('.rtl .token')]
    .map((token) => token.getBoundingClientRect().left)"""
  edges = line.evaluate(lefts)
  assert len(edges) == 7
  assert edges == sorted(edges, reverse=True)
  # Letters join: the word is as wide as it is when no tokens cut it.
  assert line.evaluate("""line => {
    const run = line.querySelector('.rtl');
    const cut = run.getBoundingClientRect().width;
    run.textContent = run.textContent;
    return Math.abs(run.getBoundingClientRect().width - cut);
  }""") == pytest.approx(0, abs=0.5)
  # Control: tokens that are isolated from each other run from left to right.
  open_latent(text_page, 0)
  open_latent(text_page, 1)
  line.evaluate("""line => {
    line.querySelector('.rtl').className = '';
    for (const token of line.querySelectorAll('.token')) {
      token.style.unicodeBidi = 'isolate';
    }
  }""")
  edges = line.evaluate(lefts.replace('.rtl .token', '.token'))
  assert edges == sorted(edges)


def test_marks_and_emoji_stay_with_their_letters(text_page):
  open_latent(text_page, 2)
  shown = ['e\u0301', '·', '◌\u0301', '👩\u200d💻', 'z⟨200D⟩']
  assert spans(text_page) == shown


def test_tokens_in_a_row_become_runs(text_page):
  """The two functions that know no page, on what is hard to see in one."""
  shown = text_page.evaluate("""async () => {
    const { runs, spell } = await import('./spelling.js');
    return [
      ['א', '\\n', 'ב', ' c'], ['a ', 'א', '1', ' ', 'ב', ', b'],
      ['', [0xf0, 0x9f], '', [0x99, 0x82], [0xed, 0xa0, 0x80]],
      ['\\r', '\\n\\n  x', '   ', '\\u202e', '\\u200f\\u05d0'],
    ].map((tokens) => runs(spell(tokens)).map((run) => run.direction
      + run.units.map((unit) => unit.lines.join('/') + unit.tokens).join(' ')));
  }""")
  assert shown == [
    ['rtlא0', '↵1', 'rtlב2', ' c3'],
    ['a 0', 'rtlא1 12 ·3 ב4', ', b5'],
    ['∅0', '🙂1,3', '⟨xED⟩⟨xA0⟩⟨x80⟩4'],
    ['⟨0D⟩0', '↵/↵/  x1', '···2', '⟨202E⟩3', 'rtl⟨200F⟩א4'],
  ]
