"""Fixtures of the page's tests: an index, its URL, headless Chromium."""

import os
import shutil

import pytest

from sae_jax.browser import index
from tests.support import synthetic_features
from tests.support.browser.pages import N_LATENTS, serve, start, visit


@pytest.fixture(scope='module')
def made():
  return synthetic_features.make(
    n_latents=N_LATENTS, n_examples=5, window=32, n_tokens=8000
  )


@pytest.fixture(scope='module')
def folder(made, tmp_path_factory):
  out = tmp_path_factory.mktemp('page')
  synthetic_features.build(
    *made, out, index.BrowseConfig(title='A test of features')
  )
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
  with start(path) as browser:
    yield browser


@pytest.fixture
def page(chromium, url):
  with visit(chromium, url) as (page, problems):
    page.wait_for_selector('#rows .preview .token')
    yield page
    page.wait_for_timeout(50)
    assert problems == []
