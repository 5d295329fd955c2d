"""Small checkpoints that no run has saved."""

import dataclasses

import jax
import jax.numpy as jnp

from sae_jax import autoencoder, checkpoint
from sae_jax.storage import orbax as orbax_lib
from sae_jax.storage import saved_arrays

CONFIG = autoencoder.SaeConfig(d_model=4, n_latents=8, k=2)
METADATA = checkpoint.Metadata(
  train_config={
    'sae': dataclasses.asdict(CONFIG),
    'optimizer': {'ema_decay': 0.75},
    'sample_rows': 9,
  },
  mse_of_mean=2.5,
  dataset={'site': 'blocks.0.resid_post', 'version': 3},
  metric_definitions={'nmse': 'an error'},
  feed={'window': 2},
)


def contents(activation='topk', **sizes):
  """Arrays of all parts, each with numbers of its own."""
  config = dataclasses.replace(CONFIG, activation=activation, **sizes)
  sae = autoencoder.init_weights(config, jax.random.key(0))
  trained = autoencoder.trained(sae)

  def times(number):
    return {name: number * a + 1 for name, a in trained.items()}

  return checkpoint.Contents(
    sae=sae,
    ema={'count': jnp.array(2), 'ema': times(3)},
    adam={'count': jnp.array(2), 'mu': times(4), 'nu': times(5)},
    progress={
      'silent_N': jnp.arange(8),
      'mse_of_mean': jnp.array(2.5),
      'step': jnp.array(7),
      'skipped': jnp.array(0),
    },
  )


def save(workdir, saved, metadata=METADATA, step=7):
  with checkpoint.open_checkpointer(workdir) as checkpointer:
    checkpoint.save(checkpointer, step, saved, metadata).result()


def as_in_a_bucket(monkeypatch):
  """Checkpoints on disk are laid out as in a bucket: a file for each chunk."""
  on_disk = orbax_lib.context

  def context(*arguments):
    settings = on_disk(*arguments)
    settings.array.saving.use_ocdbt = False
    return settings

  monkeypatch.setattr(orbax_lib, 'context', context)


def without_digests(monkeypatch):
  """Checkpoints are saved as older versions saved them."""
  monkeypatch.setattr(saved_arrays, 'add_digests', lambda spec: None)

  def save(checkpointer, step, saved, metadata):
    return checkpointer.save_checkpointables_async(
      step,
      saved.parts(),
      force=True,
      custom_metadata=dataclasses.asdict(metadata),
    )

  monkeypatch.setattr(checkpoint, 'save', save)
