"""From text to page in one small run, the page opened where Chromium is."""

import json
import shutil

import numpy as np
import pytest

from sae_jax import checkpoint, store
from sae_jax.subject import capture
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


@pytest.mark.parametrize(
  ('family', 'name'), [('gpt2', 'attn_out'), ('gemma', 'mlp_act')]
)
def test_other_sites_and_families_become_a_page(family, name, texts, tmp_path):
  site = capture.Site(1, name)
  report = pipeline.run(texts, str(tmp_path), family, site)
  config = toy.subject(family).config
  assert report['d_model'] == capture.width(config, site)
  assert report['site'] == f'blocks.1.{name}'
  # Control: what is not trained does worse.
  assert report['fvu'] < report['fvu_untrained']
  assert report['ce_zero'] != report['ce']
  assert np.isfinite([report['delta_ce'], report['kl']]).all()
  columns = json.loads((tmp_path / 'page/data/columns.json').read_text())
  assert len(columns['latent']) == report['n_latents']
  assert any(columns['count'])


def test_a_transcoder_becomes_a_page(texts, tmp_path):
  read, written = (capture.Site(1, name) for name in ('mlp_in', 'mlp_out'))
  suite = ('quick', 'ablation')
  report = pipeline.run(texts, str(tmp_path), 'llama', read, written, suite)
  assert report['target_site'] == 'blocks.1.mlp_out'
  # Controls: what is not trained does worse, and so do zeros.
  assert report['fvu'] < report['fvu_untrained']
  assert report['ce_zero'] != report['ce'] != report['ce_spliced']
  evaluated = report['evaluations']
  assert (
    'whose latents act at blocks.1.mlp_out' in evaluated['ablation']['cannot']
  )
  text = (tmp_path / 'probe/report.html').read_text()
  assert 'Transcoder of blocks.1.mlp_in to blocks.1.mlp_out' in text
  assert '<dt>untrained</dt>' in text and '<dt>PCA</dt>' not in text
  columns = json.loads((tmp_path / 'page/data/columns.json').read_text())
  assert any(columns['count'])
