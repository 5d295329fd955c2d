"""Streams over a mesh."""

import dataclasses

import numpy as np
import pytest

from sae_jax import autoencoder, errors, mesh, store
from sae_jax import subject as subject_lib
from sae_jax.feed import from_text
from sae_jax.training import train
from tests.support import planted, runs, streams, toy


@pytest.fixture
def opened(texts, tmp_path):
  return streams.harvested(texts, tmp_path / 'store')


@pytest.mark.parametrize(('data', 'latent'), [(4, 2), (1, 2)])
def test_a_mesh_changes_nothing(opened, data, latent):
  want = streams.batches(streams.feed(opened), 0, 40)
  got = streams.batches(streams.feed(opened, data=data, latent=latent), 0, 40)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_run_is_stopped_and_goes_on_to_the_bit(opened, tmp_path, monkeypatch):
  subject = toy.subject()
  monkeypatch.setattr(subject_lib, 'load_recorded', lambda *args: subject)
  config = planted.train_config(
    sae=autoencoder.SaeConfig(d_model=16, n_latents=64, k=4),
    stream=True, batch_size=32, eval_rows=24, mesh_data=4, mesh_latent=2,
  )  # fmt: skip
  whole, broken = str(tmp_path / 'whole'), str(tmp_path / 'broken')
  train.train(config, opened.url, whole)
  streams.break_off(17, config, broken, opened.url)
  assert runs.saved_steps(broken) == [10]
  train.train(config, opened.url, broken)
  runs.assert_same_run(broken, whole)
  # It is no run on the store.
  stored = str(tmp_path / 'stored')
  train.train(dataclasses.replace(config, stream=False), opened.url, stored)
  assert runs.log(stored) != runs.log(whole)
  with pytest.raises(errors.UserError, match='stream: True -> False'):
    train.train(dataclasses.replace(config, stream=False), opened.url, whole)


def test_what_cannot_be_streamed_is_refused(texts, tmp_path, opened):
  planted.write_store(str(tmp_path / 'planted'))
  with pytest.raises(errors.UserError, match='not made by sae-harvest'):
    streams.feed(store.open_store(str(tmp_path / 'planted')))
  whole = streams.harvested(texts, tmp_path / 'whole', n_tokens=10**6)
  with pytest.raises(errors.UserError, match='no text after the documents'):
    streams.feed(whole)
  with pytest.raises(errors.UserError, match='batch_contexts 4 must be a mul'):
    streams.feed(opened, data=8)
  subject = dataclasses.replace(toy.subject(), weights_sha256='other')
  with pytest.raises(errors.UserError, match='is not the model store'):
    from_text.TextFeed(opened, 4, 0, 1, mesh.make_mesh(1, 8), None, subject)
  texts.write_text(texts.read_text().replace('a', 'b'))
  with pytest.raises(errors.UserError, match='is not what store'):
    streams.feed(opened)
