"""Fixtures of the page's tests: an index, its URL, headless Chromium."""

import os
import shutil

import pytest

from sae_jax.browser import index
from tests.support import synthetic_features
from tests.support.browser.pages import N_LATENTS, serve, visit

FLAGS = (
  '--no-sandbox',
  '--disable-gpu',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
)


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
  # Here, since an interpreter without playwright still collects the tests.
  from playwright import sync_api

  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
    yield browser
    browser.close()


@pytest.fixture
def page(chromium, url):
  with visit(chromium, url) as (page, problems):
    page.wait_for_selector('#rows .preview .token')
    yield page
    page.wait_for_timeout(50)
    assert problems == []
