"""Autoencoders of other libraries as checkpoints, which every stage reads."""

import dataclasses
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax

from sae_jax import autoencoder, checkpoint, errors
from sae_jax import config as config_lib
from sae_jax.autoencoder import metrics
from sae_jax.interchange import core, imported
from sae_jax.interchange.imported import Imported
from sae_jax.storage import joined, saved_tensors, tensors
from sae_jax.storage import workdir as workdir_lib
from sae_jax.store import Store
from sae_jax.training import given
from sae_jax.training.config import TrainConfig
from sae_jax.training.optimizer import OptimizerConfig

STAGE = 'sae-convert'
# The one parameter that has moments: a checkpoint holds some, and a run that
# begins with an autoencoder has fresh ones.
_SMALL = 'b_pre_D'
# What is converted is read as it is saved, and may be a terabyte.
_LONGEST_S = 7 * 24 * 3600


def write(
  of: Imported,
  data: Store,
  workdir: str,
) -> checkpoint.Metadata:
  """Writes an autoencoder of another library as a checkpoint of step 0.

  Of its matrices no more than a few chunks are in memory.

  Args:
    of: what it is.
    data: activations of the site that it reads, and of a transcoder those that
      it writes.
    workdir: an empty or a new folder, local or in a bucket.

  Raises:
    UserError: if ours cannot be that function, the store is of another width,
      or the folder is not free.
  """
  if data.manifest.d_model != of.d_in:
    raise errors.UserError(
      f'{of.url} reads activations of width {of.d_in}, store {data.url} holds '
      f'width {data.manifest.d_model}: give a store of its own site'
    )
  core.check(of)
  if imported.is_transcoder(of) and not data.target_site:
    raise errors.UserError(
      f'{of.url} is a transcoder: say with --target_site which site of store '
      f'{data.url} it writes, of {", ".join(data.manifest.sites)}'
    )
  if data.target_site and not imported.is_transcoder(of):
    raise errors.UserError(
      f'{of.url} is an autoencoder, which writes what it reads: leave the '
      f'target site {data.target_site} out'
    )
  config, sae = core.to_ours(of, data.target_site)
  sample_BX = data.finite_rows(0, min(TrainConfig().sample_rows, data.n_train))
  mse_of_mean = float(given.mse_of_mean(config, _small(sae), sample_BX))
  metadata = checkpoint.Metadata(
    train_config=_train_config(config, data),
    mse_of_mean=mse_of_mean,
    dataset=data.about | {'imported': _record(of)},
    metric_definitions=metrics.METRIC_DEFINITIONS,
  )
  made_from = config_lib.through_json(
    {'from': of.url, 'format': of.format, 'store': data.manifest.identity}
  )
  joined.claim(workdir, lambda: _take(workdir, made_from))
  saved_tensors.register()
  with checkpoint.open_checkpointer(
    workdir, timeout_s=_LONGEST_S
  ) as checkpointer:
    contents = _contents(sae, mse_of_mean)
    checkpoint.save(checkpointer, 0, contents, metadata).result()
  return metadata


def _take(workdir: str, made_from: dict[str, Any]) -> None:
  """Claims the folder for these results; UserError if it is not free."""
  workdir_lib.check_own(workdir, STAGE)
  if checkpoint.exists(workdir):
    raise errors.UserError(
      f'{workdir} holds a checkpoint already: use another folder, or delete it'
    )
  epath.Path(workdir).mkdir(parents=True, exist_ok=True)
  workdir_lib.sign(workdir, STAGE, made_from)


def _small(sae: autoencoder.Sae) -> autoencoder.Sae:
  """The arrays without the latents: what statistics need."""
  nothing = tensors.from_array(np.zeros((0, *sae.b_pre_D.shape), np.float32))
  small = sae.replace(
    w_enc_ND=nothing, w_dec_ND=nothing, b_lat_N=nothing, extra={}
  )
  return jax.tree.map(lambda tensor: tensor.read(), small)


def _train_config(config: autoencoder.SaeConfig, data: Store) -> dict[str, Any]:
  """A run of which this would be the beginning."""
  optimizer = dataclasses.replace(
    OptimizerConfig().with_defaults(), ema_decay=0.0
  )
  return dataclasses.asdict(
    TrainConfig(sae=config, optimizer=optimizer, site=data.site)
  )


def _record(of: Imported) -> dict[str, Any]:
  """What the checkpoint says of where it is from."""
  return {
    'format': of.format,
    'url': of.url,
    'semantics': dataclasses.asdict(of.semantics),
    'provenance': dataclasses.asdict(of.provenance),
  }


def _contents(sae: autoencoder.Sae, mse_of_mean: float) -> checkpoint.Contents:
  """The arrays of a checkpoint before any step."""
  n_latents, d_model = sae.w_enc_ND.shape
  moments = {_SMALL: jnp.zeros((d_model,))}
  count = jnp.zeros((), jnp.int32)
  return checkpoint.Contents(
    sae=sae,
    ema=optax.EmaState(count, moments),
    adam=optax.ScaleByAdamState(count, moments, moments),
    progress={
      'silent_N': jnp.zeros((n_latents,), jnp.int32),
      'mse_of_mean': jnp.float32(mse_of_mean),
      'step': count,
      'skipped': count,
    },
  )
