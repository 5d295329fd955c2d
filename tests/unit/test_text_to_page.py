"""From text to page in one small run, the page opened where Chromium is."""

import json
import shutil

from sae_jax import checkpoint, store
from tests.support import pipeline, toy
from tests.support.browser import pages


def test_a_text_becomes_a_page(texts, tmp_path):
  # A folder's name is no pattern, whatever it looks like.
  tmp_path = tmp_path / 'k=[16,32] *?'
  report = pipeline.run(texts, str(tmp_path))
  opened = store.open_store(str(tmp_path / 'store'))
  contexts = toy.expected_contexts(toy.config(texts))
  assert opened.manifest.n_stream == sum(len(ids) for _, ids in contexts)
  trained = checkpoint.load(str(tmp_path / 'run'))
  assert trained.step == pipeline.STEPS
  # Control: what is not trained does worse.
  assert report['fvu'] < report['fvu_untrained']
  columns = json.loads((tmp_path / 'page/data/columns.json').read_text())
  n_latents = trained.config.n_latents
  assert len(columns['latent']) == n_latents
  alive = [n for n, count in enumerate(columns['count']) if count]
  assert len(alive) > 0
  chromium = shutil.which('chromium')
  if chromium is None:
    return
  with (
    pages.serve(tmp_path / 'page') as url,
    pages.start(chromium) as browser,
    pages.visit(browser, url) as (page, problems),
  ):
    page.wait_for_selector('#rows .preview .token')
    assert set(pages.listed(page)) == set(range(n_latents))
    pages.open_latent(page, alive[0])
    assert page.query_selector('.feature .token')
    assert problems == []
