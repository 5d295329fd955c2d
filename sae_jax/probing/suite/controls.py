"""Controls as autoencoders: what knows nothing of sparse features.

Each has as many active latents a token as the autoencoder has, and is encoded
and decoded by the same code: any evaluation can be done of it.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from sae_jax import autoencoder
from sae_jax import mesh as mesh_lib
from sae_jax.checkpoint import Trained
from sae_jax.probing import baselines
from sae_jax.probing.scan import run as scan_run

CHANNELS, PCA, UNTRAINED = 'channels', 'PCA', 'untrained'
DEFINITIONS = {
  UNTRAINED: 'An autoencoder of the same shape with random directions, fitted '
  'to the length of the activations and not trained.',
  PCA: 'Principal components of training activations, as many as the '
  'autoencoder has active latents a token; all are used for every token.',
  CHANNELS: "The activation's own channels less their mean: of each token the "
  'largest, as many as the autoencoder has active latents.',
}


def of_directions(
  like: Trained, directions_KD: np.ndarray, mean_D: np.ndarray, k: int, mesh
) -> Trained:
  """Directions, each and its opposite a latent, as a TopK autoencoder.

  Args:
    like: gives the preprocessing and its statistics.
    directions_KD: orthonormal rows.
    mean_D: what is subtracted first, of preprocessed activations.
    k: active latents a token, at most K.
    mesh: where it is put. Latents that never fire make their number divide.
  """
  both_ND = np.concatenate([directions_KD, -directions_KD])
  short = -len(both_ND) % mesh.shape['latent']
  both_ND = np.pad(both_ND, ((0, short), (0, 0))).astype(np.float32)
  config = dataclasses.replace(
    like.config,
    n_latents=len(both_ND),
    k=min(k, len(directions_KD)),
    activation='topk',
    # Their mean is taken away before they are looked for.
    pre_bias='tied',
  )
  sae = autoencoder.Sae(
    w_enc_ND=jnp.asarray(both_ND),
    w_dec_ND=jnp.asarray(both_ND),
    b_lat_N=jnp.zeros(len(both_ND), jnp.float32),
    b_pre_D=jnp.asarray(mean_D, jnp.float32),
    data_mean_D=like.sae.data_mean_D,
    data_scale=like.sae.data_scale,
  )
  return Trained(config, scan_run.on_mesh(sae, mesh), like.mse_of_mean, step=0)


def channels(
  like: Trained, fitted: baselines.PcaState, k: int, mesh: mesh_lib.Mesh
) -> Trained:
  """The largest k channels of each token.

  Args:
    like: the autoencoder that it stands beside.
    fitted: preprocessed training rows.
    k: active latents a token.
    mesh: where it is put.
  """
  d_model = like.config.d_model
  return of_directions(like, np.eye(d_model), fitted.mean_D, k, mesh)


def components(
  like: Trained, fitted: baselines.PcaState, k: int, mesh: mesh_lib.Mesh
) -> Trained:
  """The first k principal components; see `channels`."""
  pca = baselines.principal(fitted, k)
  return of_directions(like, pca.components_KD, pca.mean_D, k, mesh)
