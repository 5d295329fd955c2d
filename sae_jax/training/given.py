"""Runs that begin with an autoencoder that there is: fine-tuning."""

import dataclasses

from absl import logging
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from sae_jax import autoencoder, checkpoint, errors, store
from sae_jax.training.config import TrainConfig

# What says how an autoencoder is computed, and not what it is.
_OWN = ('matmul',)


def with_its_settings(config: TrainConfig) -> TrainConfig:
  """The run with the settings of the autoencoder that it begins with.

  A setting at its usual value is one that was not given.

  Raises:
    UserError: if there is no such checkpoint, or the run has other settings.
  """
  if not config.from_checkpoint:
    return config
  its = _metadata(config.from_checkpoint).sae_config
  own, usual = config.sae, autoencoder.SaeConfig()
  names = [field.name for field in dataclasses.fields(own)]
  for name in names:
    value = getattr(own, name)
    if name not in _OWN and value not in (
      getattr(usual, name),
      getattr(its, name),
    ):
      raise errors.UserError(
        f'{name} {value} is not that of {config.from_checkpoint}, '
        f'{getattr(its, name)}, with which the run begins: leave it out'
      )
  logging.info(
    '%s: begins with %s, k %d, preprocessing %s',
    config.from_checkpoint,
    its.activation,
    its.k,
    its.preprocessing,
  )
  kept = {name: getattr(own, name) for name in _OWN}
  return dataclasses.replace(config, sae=dataclasses.replace(its, **kept))


def check(config: TrainConfig, data: store.Store) -> None:
  """Compares the activations that a run begins and goes on with.

  Raises:
    UserError: if they have other widths.
  """
  if not config.from_checkpoint:
    return
  url, manifest = config.from_checkpoint, data.manifest
  if config.sae.d_model != manifest.d_model:
    raise errors.UserError(
      f'{url} reads activations of width {config.sae.d_model}, store '
      f'{data.url} holds width {manifest.d_model}: give a store of its site'
    )
  trained_on = _metadata(url).dataset
  own = manifest.weights_sha256, data.site
  if (trained_on.get('weights_sha256'), trained_on.get('site')) != own:
    logging.warning(
      '%s is of %s of %s, and the run is of %s of %s',
      url,
      trained_on.get('site'),
      trained_on.get('subject'),
      data.site,
      manifest.subject,
    )


def _metadata(url: str) -> checkpoint.Metadata:
  if not checkpoint.exists(url):
    raise errors.UserError(
      f'no checkpoints under {url}: give the workdir of sae-train or '
      'sae-convert to begin with'
    )
  with checkpoint.open_checkpointer(url, keep=None) as checkpointer:
    return checkpoint.read_metadata(checkpointer, checkpointer.latest.step)


def sae(config: TrainConfig, mesh: Mesh) -> autoencoder.Sae:
  """The autoencoder that a run begins with, its average if it has one."""
  return checkpoint.load(config.from_checkpoint, mesh=mesh).sae


def mse_of_mean(
  config: autoencoder.SaeConfig, sae: autoencoder.Sae, sample_BX: np.ndarray
) -> jax.Array:
  """Squared error of the mean predictor per token, that NMSE divides by.

  Args:
    config: the autoencoder's.
    sae: the autoencoder.
    sample_BX: raw rows from the start of the run.
  """
  tokens_BX, _ = jax.jit(autoencoder.tokens, static_argnums=0)(
    config, sae, jnp.asarray(sample_BX)
  )
  _, target_BD = autoencoder.halves(config, tokens_BX)
  return ((target_BD - target_BD.mean(0)) ** 2).sum(-1).mean()
