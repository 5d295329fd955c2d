"""A store of activations made of known directions, and small runs on it."""

import jax
import numpy as np

from sae_jax.autoencoder import SaeConfig
from sae_jax.store import writer as writer_lib
from sae_jax.store.manifest import StorePlan
from sae_jax.training.config import TrainConfig
from sae_jax.training.objective import ObjectiveConfig
from sae_jax.training.optimizer import OptimizerConfig

D_MODEL, DIRECTIONS, ACTIVE = 16, 32, 3


def activations(n_rows, seed=0):
  """Sums of ACTIVE of DIRECTIONS unit vectors, plus a mean and noise."""
  rng = np.random.default_rng(seed)
  dictionary = rng.standard_normal((DIRECTIONS, D_MODEL))
  dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
  chosen = np.argsort(rng.random((n_rows, DIRECTIONS)), axis=1)[:, :ACTIVE]
  weight = rng.uniform(1, 3, (n_rows, ACTIVE))
  out = (weight[:, :, None] * dictionary[chosen]).sum(1)
  out += 0.5 + 0.02 * rng.standard_normal(out.shape)
  return out.astype(np.float32)


def targets(rows_RD, seed=7):
  """What a block might make of them: pieces that are linear, and noise."""
  rng = np.random.default_rng(seed)
  first, second = rng.standard_normal((2, D_MODEL, D_MODEL)) / D_MODEL**0.5
  hidden_RD = np.maximum(rows_RD @ first - 0.5, 0)
  noise_RD = 0.02 * rng.standard_normal(rows_RD.shape)
  return (3 + hidden_RD @ second + noise_RD).astype(np.float32)


def write_store(
  url,
  n_rows=2000,
  context=20,
  contexts_per_document=5,
  holdout_documents=3,
  subject='planted',
  weights_sha256='0' * 64,
  rows_RD=None,
  vocabulary=50,
  site='blocks.0.resid_post',
  target_site='',
  targets_RD=None,
):
  """A finished store; position 0 of each context is masked."""
  rng = np.random.default_rng(1)
  per_document = (context - 1) * contexts_per_document
  documents = -(-n_rows // per_document)
  n_rows = documents * per_document
  rows_RD = activations(n_rows) if rows_RD is None else rows_RD
  plan = StorePlan(
    subject=subject,
    sites=(site, target_site) if target_site else (site,),
    d_model=rows_RD.shape[1],
    weights_sha256=weights_sha256,
    chunk_rows=64,
    shard_rows=256,
    context_length=context,
    sources=('made',),
  )

  sites = {site: rows_RD} | ({target_site: targets_RD} if target_site else {})

  def contexts():
    for i in range(documents * contexts_per_document):
      positions = np.arange(context)
      yield (
        rng.integers(0, vocabulary, context),
        np.full(context, i // contexts_per_document),
        positions,
        positions > 0,
        {
          name: of_site_RD[(context - 1) * i :][: context - 1]
          for name, of_site_RD in sites.items()
        },
      )

  return writer_lib.write(
    url,
    plan,
    contexts(),
    holdout_rows=holdout_documents * per_document,
    mask={'rule': 'position 0'},
  )


def train_config(**kwargs):
  """A run of seconds, its latents over all devices there are.

  Keyword arguments replace TrainConfig's fields.
  """
  values = {
    'sae': SaeConfig(d_model=D_MODEL, n_latents=64, k=4),
    'objective': ObjectiveConfig(k_aux=8, dead_after_tokens=600),
    # A constant rate, so that a run can go on to more steps.
    'optimizer': OptimizerConfig(
      learning_rate=3e-3, warmup_steps=0, decay_steps=0, ema_decay=0.9
    ),
    'batch_size': 64,
    'steps': 30,
    'sample_rows': 500,
    'window_chunks': 4,
    'log_every': 1,
    'checkpoint_every': 10,
    'mesh_data': 1,
    'mesh_latent': jax.device_count(),
  }
  return TrainConfig(**(values | kwargs))
