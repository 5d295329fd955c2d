"""An autoencoder and tasks whose best latents are known."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import autoencoder
from sae_jax import mesh as mesh_lib
from sae_jax.checkpoint import Trained
from sae_jax.probing import pooled, search

WIDTH = 12
# The latents that know the labels of the tasks.
KNOW = (7, 211)


def make_trained(n_latents, seed=0):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  w_enc_ND = normal(n_latents, WIDTH) / WIDTH**0.5
  sae = autoencoder.Sae(
    w_enc_ND=w_enc_ND,
    w_dec_ND=w_enc_ND,
    b_lat_N=normal(n_latents) / 10,
    b_pre_D=normal(WIDTH) / 10,
    data_mean_D=jnp.zeros(WIDTH),
    data_scale=jnp.ones(()),
  )
  config = autoencoder.SaeConfig(WIDTH, n_latents, 4)
  return Trained(config, sae, 1.0, 0)


def replaced(trained, **arrays):
  """The autoencoder with other arrays."""
  return dataclasses.replace(trained, sae=trained.sae.replace(**arrays))


def make_training(trained, n_prompts=100, seed=0):
  """A task for each of `KNOW`, whose labels move prompts along its row."""
  rng = np.random.default_rng(seed)
  w_enc_ND = np.asarray(trained.sae.w_enc_ND)
  out = []
  for latent in KNOW[: 1 + (trained.config.n_latents > KNOW[1])]:
    labels_P = rng.permutation(np.arange(n_prompts) % 2)
    x_PD = rng.standard_normal((n_prompts, WIDTH))
    row_D = w_enc_ND[latent] / np.linalg.norm(w_enc_ND[latent])
    x_PD += 3 * labels_P[:, None] * row_D
    out.append(
      search.Training(
        x_PD.astype(np.float32), labels_P, rng.permutation(labels_P)
      )
    )
  return out


def search_all(data, latent, n_latents, n_best=4):
  """Searches on a mesh; what is known of each task, and the meshes' losses."""
  mesh = mesh_lib.make_mesh(data, latent, jax.devices()[: data * latent])
  made = make_trained(n_latents)
  training = make_training(made)
  trained = pooled.on_mesh(made, mesh)
  return search.search(trained, mesh, training, n_best, all_losses=True)


def search_and_score(path):
  """On eight devices: best latents, and pre-activations of the best."""
  best = search_all(2, 4, 296)
  mesh = mesh_lib.make_mesh(2, 4)
  trained = pooled.on_mesh(make_trained(296), mesh)
  x_PD = make_training(trained)[0].x_PD
  pre_PQ = pooled.pre_activations(trained, x_PD, best[0].latent.latent_Q)
  parts = [task[:3] for task in best]
  with open(path, 'wb') as file:
    pickle.dump((parts, pre_PQ), file)
