"""A page that was built anew, in a browser that keeps what it had."""

import os
import shutil
import time

from etils import epath
import pytest

from sae_jax.browser import static
from tests.support import synthetic_features
from tests.support.browser.pages import serve, visit

MONTH = 30 * 86_400


def upgrade(folder):
  """The next version's scripts: one needs what is new in another."""
  shutil.copytree(static.PAGE, folder)
  feature, app = folder / 'feature.js', folder / 'app.js'
  feature.write_text(feature.read_text() + "\nexport const NEW = 'new';\n")
  app.write_text(
    app.read_text().replace(
      'import { featureView,', 'import { NEW, featureView,'
    )
    + '\ndocument.body.dataset.version = NEW;\n'
  )
  style = folder / 'style.css'
  style.write_text(style.read_text() + '\nbody { --version: new; }\n')
  return epath.Path(folder)


def age(folder):
  """Makes files old, which browsers then keep for days without asking."""
  then = time.time() - MONTH
  for path in folder.rglob('*'):
    os.utime(path, (then, then))


VERSION = """() => [document.body.dataset.view, document.body.dataset.version,
  getComputedStyle(document.body).getPropertyValue('--version')]"""


@pytest.mark.parametrize('addressed', [True, False])
def test_new_scripts_run_after_a_rebuild(
  made, chromium, tmp_path, monkeypatch, addressed
):
  """Control: they do not where the addresses say nothing of the version."""
  out = tmp_path / 'out'
  if not addressed:
    plain = {path.name: path.read_bytes() for path in static.PAGE.iterdir()}
    monkeypatch.setattr(static, 'contents', lambda: plain)
  synthetic_features.build(*made, out)
  age(out)
  with serve(out) as url, visit(chromium, url) as (page, problems):
    page.wait_for_selector('#rows .preview .token')
    assert page.evaluate(VERSION) == ['overview', None, '']
    monkeypatch.setattr(static, 'PAGE', upgrade(tmp_path / 'new'))
    synthetic_features.build(*made, out)
    again = page.context.new_page()
    again.goto(url)
    if addressed:
      again.wait_for_selector('#rows .preview .token')
      assert again.evaluate(VERSION) == ['overview', 'new', 'new']
      assert problems == []
    else:
      again.wait_for_timeout(500)
      assert again.evaluate(VERSION) != ['overview', 'new', 'new']


@pytest.mark.parametrize('name', ['columns.json', 'features/00000.json'])
def test_damage_that_was_mended_is_not_kept(made, chromium, tmp_path, name):
  """A build of the same results has the same addresses."""
  synthetic_features.build(*made, tmp_path)
  path = tmp_path / 'data' / name
  path.write_bytes(path.read_bytes()[:-9])
  age(tmp_path)
  with serve(tmp_path) as url, visit(chromium, url) as (page, _):
    page.evaluate("location.hash = '#/latent/7'")
    page.wait_for_selector('main [role=alert]')
    synthetic_features.build(*made, tmp_path)
    again = page.context.new_page()
    again.goto(url + '#/latent/7')
    again.wait_for_selector('.feature .columns:not([aria-busy])')
    assert again.locator('main [role=alert]').count() == 0


def test_a_cache_that_stays_old_is_named(made, chromium, tmp_path):
  """A server that hands out an old page beside new data."""
  synthetic_features.build(*made, tmp_path)
  meta = tmp_path / 'data' / 'meta.json'
  old = meta.read_text()
  meta.write_text(
    old.replace(static.digest(), '0123456789abcdef').replace(
      '"format_version":4', '"format_version":5'
    )
  )
  # The server tells versions apart by the second in which they were written.
  age(tmp_path)
  with serve(tmp_path) as url, visit(chromium, url) as (page, problems):
    page.wait_for_selector('text=This page is older than its data')
    assert 'Clear the browser' in page.locator('main').inner_text()
    meta.write_text(old)
    page.reload()
    page.wait_for_selector('#rows .preview .token')
    assert problems == []
