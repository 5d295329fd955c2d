"""A small store and the stream that goes on after it."""

import jax
import numpy as np
import pytest

from sae_jax import mesh, store
from sae_jax.feed import from_text
from sae_jax.harvesting import harvest
from sae_jax.training import train
from sae_jax.training.config import TrainConfig
from tests.support import runs, toy

# Of eighty documents the store has some twenty.
STORED = 300


def harvested(texts, url, **changes):
  fields = {'n_tokens': STORED, 'mask_norm_multiple': 2.0} | changes
  harvest.harvest(toy.config(texts, **fields), str(url), toy.subject())
  return store.open_store(str(url))


def feed(opened, cursor=None, data=1, batch=16, chunks=1, seed=3, latent=1):
  devices = mesh.make_mesh(data, latent, jax.devices()[: data * latent])
  return from_text.TextFeed(
    opened, batch, seed, chunks, devices, cursor, toy.subject()
  )


def batches(feed, start, stop):
  return [np.asarray(batch_BD) for batch_BD in feed.iterate(start, stop)]


def break_off(step, config: TrainConfig, workdir, url):
  iterate = from_text.TextFeed.iterate

  def breaks_off(self, start, stop):
    for number, batch_BD in enumerate(iterate(self, start, stop), start):
      if number == step:
        raise runs.Stop
      yield batch_BD

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(from_text.TextFeed, 'iterate', breaks_off)
    with pytest.raises(runs.Stop):
      train.train(config, url, workdir)
