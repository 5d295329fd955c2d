"""Visiting the feature page: serving, watching, reading what it shows."""

import contextlib
import functools
import http.server
import threading

import numpy as np

from tests.support import synthetic_features

N_LATENTS = 120

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


_FLAGS = (
  '--no-sandbox',
  '--disable-gpu',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
)


@contextlib.contextmanager
def start(path):
  """Headless Chromium; path is that of its program."""
  # Here, since an interpreter without playwright still collects the tests.
  from playwright import sync_api

  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=path, args=_FLAGS)
    yield browser
    browser.close()


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


@contextlib.contextmanager
def visit(chromium, url, **context):
  """A page, and the list of all that a sound page never does."""
  context.setdefault('viewport', {'width': 1400, 'height': 800})
  opened = chromium.new_context(**context)
  page = opened.new_page()
  # The other tests may have all the cores.
  page.set_default_timeout(60_000)
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


def expected_order(features, key, ascending):
  """Live latents by (value, number); silent ones behind, by number."""
  values = features['latent_ids' if key == 'latent' else key].astype(float)
  keys = values if ascending else -values
  silent = features['count'] == 0
  if key == 'latent':
    silent = np.zeros_like(silent)
  keys = np.where(silent, 0, keys)
  return np.lexsort((features['latent_ids'], keys, silent)).tolist()
