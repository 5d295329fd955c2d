"""A list that is taller than browsers let a box be."""

import shutil

import pytest

from tests.support.browser.pages import (
  N_LATENTS,
  open_latent,
  serve,
  visit,
)

ROW = 62
SEEN = """() => {
  const pane = document.getElementById('scroller').getBoundingClientRect();
  return [...document.querySelectorAll('#rows li')].filter((row) => {
    const box = row.getBoundingClientRect();
    return box.top >= Math.max(0, pane.top) - 1
      && box.bottom <= Math.min(innerHeight, pane.bottom) + 1;
  }).map((row) => Number(row.ariaPosInSet));
}"""


@pytest.fixture(scope='module')
def short_url(folder, tmp_path_factory):
  """The page, in a browser that allows a box of 3,000 pixels."""
  out = tmp_path_factory.mktemp('short') / 'page'
  shutil.copytree(folder, out)
  text = (out / 'scrolling.js').read_text()
  assert 'TALLEST = 15e6' in text and 'EDGE = 1e6' in text
  text = text.replace('TALLEST = 15e6', 'TALLEST = 4000')
  (out / 'scrolling.js').write_text(text.replace('EDGE = 1e6', 'EDGE = 800'))
  with serve(out) as url:
    yield url


def scrolled(page, to):
  page.evaluate(
    """(to) => {
      const box = document.getElementById('scroller');
      if (box.scrollHeight > box.clientHeight) box.scrollTop = to;
      else scrollTo(0, to);
    }""",
    to,
  )
  return settled(page)


def settled(page):
  """The rows in view, once the list stands still; they follow each other."""
  # Timers run in their order, the page's own of 150 ms first.
  page.evaluate("""async () => {
    await new Promise(requestAnimationFrame);
    await new Promise(requestAnimationFrame);
    await new Promise((done) => setTimeout(done, 160));
  }""")
  rows = page.evaluate(SEEN)
  assert rows == list(range(rows[0], rows[-1] + 1))
  return rows


def turn_wheel(page, by, expected):
  """Waits until the rows in view are as expected, which takes some frames."""
  page.mouse.wheel(0, by)
  for _ in range(100):
    if page.evaluate(SEEN) == expected:
      break
    page.wait_for_timeout(30)
  assert settled(page) == expected


def test_every_row_is_reached(chromium, short_url):
  with visit(chromium, short_url) as (page, problems):
    page.wait_for_selector('#rows .preview .token')
    height = "document.getElementById('rows').clientHeight"
    assert page.evaluate(height) == 4000 < N_LATENTS * ROW
    assert scrolled(page, 0)[0] == 1
    assert scrolled(page, 1e9)[-1] == N_LATENTS
    middle = scrolled(page, 1700)
    assert 40 < middle[0] < 80
    # Small steps are pixels of the list, of which no row is left out.
    page.mouse.move(100, 600)
    for by in (3, 3, -6, 1):
      middle = [row + by for row in middle]
      turn_wheel(page, by * ROW, middle)
    assert problems == []


def test_keys_links_and_search_land_in_the_list(chromium, short_url):
  with visit(chromium, short_url) as (page, problems):
    page.wait_for_selector('#rows .preview .token')
    page.select_option('#sort', 'latent')
    current = '#rows [aria-current=page]'

    def at():
      rows = settled(page)
      latent = page.locator(current).locator('..').get_attribute('data-latent')
      assert int(latent) + 1 in rows
      return int(latent)

    for latent in (0, 60, N_LATENTS - 1, 17, 90):
      open_latent(page, latent)
      assert at() == latent
    page.keyboard.press('j')
    assert at() == 91
    for _ in range(3):
      page.keyboard.press('r')
      page.wait_for_timeout(50)
      assert page.url.endswith(f'/{at()}')
    page.fill('#search', '#77')
    page.press('#search', 'Enter')
    page.wait_for_selector('.feature[data-latent="77"]')
    assert page.evaluate(SEEN) == [1]
    assert problems == []


def test_a_phone_reaches_every_row(chromium, short_url):
  screen = {'width': 375, 'height': 700}
  with visit(chromium, short_url, viewport=screen) as (page, problems):
    page.click('text=Browse the list')
    page.wait_for_selector('#rows .preview .token')
    assert scrolled(page, 1e9)[-1] == N_LATENTS
    rows = scrolled(page, 2600)
    rows = [row + 4 for row in rows]
    turn_wheel(page, 4 * ROW, rows)
    # It is there again after a look at a latent.
    page.locator('#rows li a').nth(12).click()
    page.wait_for_selector('.feature .columns:not([aria-busy])')
    page.go_back()
    page.wait_for_selector('.overview')
    assert abs(settled(page)[0] - rows[0]) <= 1
    assert problems == []


def test_sixteen_million_rows_are_reached(page):
  """The part that knows no page, at a height that no box has."""
  view = 800
  wrong = page.evaluate(
    """async ([row, view]) => {
    const { scrolling } = await import('./scrolling.js');
    const wrong = [];
    for (const rows of [3, 130_000, 1_048_576, 16_777_216]) {
      const scroll = scrolling(row);
      scroll.resize(rows);
      const top = Math.max(0, scroll.height() - view);
      const end = Math.max(0, rows * row - view);
      if (scroll.height() > 17e6) wrong.push(['too tall', rows]);
      // Jumps go from end to end, and what is further is further.
      let before = -1;
      for (let i = 0; i <= 50; i += 1) {
        const at = scroll.follow(top * i / 50, view);
        if (at < before) wrong.push(['back', rows, i]);
        before = at;
      }
      if (before !== end) wrong.push(['end', rows, before]);
      // Each place is shown where it was asked for, and steps start there.
      for (let i = 0; i <= 50; i += 1) {
        const place = Math.round(end * i / 50);
        const asked = scroll.moveTo(place, view);
        scroll.told(asked);
        if (asked < 0 || asked > top) wrong.push(['outside', rows, asked]);
        if (scroll.follow(asked, view) !== place) wrong.push(['lost', rows, i]);
        if (i === 0 || i === 50) continue;
        for (const by of [1, -100, 700]) {
          const at = scroll.follow(asked, view);
          const after = scroll.follow(asked + by, view);
          if (rows > 3 && after - at !== by) wrong.push(['step', rows, by]);
        }
      }
    }
    return wrong;
  }""",
    [ROW, view],
  )
  assert wrong == []
