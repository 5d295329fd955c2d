"""One vector per prompt: the subject's activations, pooled."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
from scipy import sparse

from sae_jax import autoencoder, progress
from sae_jax import mesh as mesh_lib
from sae_jax.checkpoint import Trained
from sae_jax.subject import capture, Subject
from sae_jax.subject.formats import tokenizer as tokenizer_lib

POOLING = ('mean', 'last')
_BATCH = 16
_WIDTH_STEP = 16
# Tokens that are encoded at a time.
_ENCODED = 256


class Pooled(NamedTuple):
  """What the autoencoder makes of each prompt, pooled over its tokens.

  Attributes:
    x_PD: float32 activations, preprocessed. Pre-activations are linear in them,
      so encoding the mean gives the mean of the pre-activations.
    codes_PN: the latents' activations after the nonlinearity, sparse.
  """

  x_PD: np.ndarray
  codes_PN: sparse.csr_array


def on_mesh(trained: Trained, mesh: jax.sharding.Mesh) -> Trained:
  """The autoencoder split over a mesh by the letters of its arrays' names."""
  mesh_lib.check_divides('n_latents', trained.config.n_latents, mesh, 'latent')
  shardings = mesh_lib.shardings(trained.sae, mesh)
  return dataclasses.replace(
    trained, sae=jax.device_put(trained.sae, shardings)
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _pool(
  subject_config, site, sae_config, pooling, params, sae, tokens_BT, length_B
):
  """Preprocessed activations pooled, and of every token with its weight."""
  raw_BTD = capture.capture(subject_config, params, tokens_BT, site)
  shape = raw_BTD.shape
  x_BTD, _ = autoencoder.preprocess(
    sae_config, sae, raw_BTD.reshape(-1, shape[-1])
  )
  x_BTD = x_BTD.reshape(shape)
  place_T = jnp.arange(shape[1])
  if pooling == 'last':
    weight_BT = place_T == length_B[:, None] - 1
  else:
    # Position 0 is the attention sink; a prompt of one token has no other.
    inside_BT = (place_T > 0) & (place_T < length_B[:, None])
    weight_BT = jnp.where(length_B[:, None] > 1, inside_BT, place_T == 0)
  weight_BT = weight_BT.astype(x_BTD.dtype)
  # A sum, not a product: a TPU would round the activations for that.
  total_BD = (weight_BT[:, :, None] * x_BTD).sum(1)
  count_B1 = weight_BT.sum(-1, keepdims=True)
  return total_BD / count_B1, x_BTD, weight_BT / count_B1


def pool(
  trained: Trained,
  mesh: jax.sharding.Mesh,
  subject: Subject,
  site_name: str,
  prompts: list[str],
  max_tokens: int,
  pooling: str,
  desc: str,
  bos: str = '',
) -> Pooled:
  """Reads prompts with the subject and the autoencoder.

  Args:
    trained: the autoencoder, from `on_mesh`.
    mesh: the mesh that it is on.
    subject: the model that reads the prompts.
    site_name: the site of the subject.
    prompts: P texts.
    max_tokens: longer prompts are cut to this many tokens, a BOS among them.
    pooling: 'mean' over positions from 1 on, or 'last'.
    desc: label of the progress bar.
    bos: the token that prompts begin with, as contexts of the store do; '' for
      none.
  """
  site = capture.parse_site(site_name)
  start = tokenizer_lib.context_start(subject.tokenizer, bos)
  first = [] if start is None else [start]
  ids = [
    (first + tokenizer_lib.encode(subject.tokenizer, prompt))[:max_tokens]
    or [0]
    for prompt in prompts
  ]
  out_PD = np.zeros((len(ids), trained.config.d_model), np.float32)
  # The arrays without latents, for the devices of the subject.
  common = jax.tree.map(
    np.asarray,
    trained.sae.replace(
      **{name: np.zeros(0) for name in ('w_enc_ND', 'w_dec_ND', 'b_lat_N')},
      extra={},
    ),
  )
  tokens, codes = [], []
  # Prompts of like length share a batch, so that little of it is padding.
  order = np.argsort([len(i) for i in ids], kind='stable')
  with progress.bar(total=len(ids), unit='prompt', desc=desc) as bar:
    for start in range(0, len(order), _BATCH):
      members = order[start : start + _BATCH]
      longest = max(len(ids[m]) for m in members)
      width = -(-longest // _WIDTH_STEP) * _WIDTH_STEP
      tokens_BT = np.zeros((_BATCH, width), np.int32)
      length_B = np.ones((_BATCH,), np.int32)
      for row, member in enumerate(members):
        length_B[row] = len(ids[member])
        tokens_BT[row, : length_B[row]] = ids[member]
        # One of another prompt may have an embedding that is not finite.
        tokens_BT[row, length_B[row] :] = ids[member][-1]
      pooled_BD, x_BTD, share_BT = _pool(
        subject.config,
        site,
        trained.config,
        pooling,
        subject.params,
        common,
        tokens_BT,
        length_B,
      )
      out_PD[members] = np.asarray(pooled_BD)[: len(members)]
      share_BT = np.asarray(share_BT)[: len(members)]
      row_M, place_M = np.nonzero(share_BT)
      tokens.append(
        (
          np.asarray(x_BTD)[row_M, place_M],
          share_BT[row_M, place_M],
          members[row_M],
        )
      )
      n_waiting = sum(len(x_MD) for x_MD, *_ in tokens)
      if n_waiting >= _ENCODED or start + _BATCH >= len(order):
        waiting = (np.concatenate(parts) for parts in zip(*tokens))
        codes.append(_codes(trained, mesh, *waiting))
        tokens = []
      bar.update(len(members))
  # Entries of the same prompt and latent, from its tokens, are added up.
  share, prompt, latent = (np.concatenate(parts) for parts in zip(*codes))
  shape = (len(ids), trained.config.n_latents)
  return Pooled(
    out_PD, sparse.coo_array((share, (prompt, latent)), shape).tocsr()
  )


def pre_activations(
  trained: Trained, x_PD: np.ndarray, latent_Q: np.ndarray
) -> np.ndarray:
  """Pre-activations of some latents, by the same products as those of all.

  Args:
    trained: the autoencoder.
    x_PD: pooled activations.
    latent_Q: the latents.

  Returns:
    pre_PQ float32, W_enc (x - b_pre) + b_lat before the nonlinearity.
  """
  # As b_pre_D is, so that every process has them.
  sharding = trained.sae.b_pre_D.sharding
  return np.asarray(
    _pre_activations(trained.config, sharding, trained.sae, x_PD, latent_Q)
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pre_activations(config, sharding, sae, x_PD, latent_Q):
  arrays = {
    name: getattr(sae, name)[latent_Q] for name in ('w_enc_ND', 'b_lat_N')
  }
  part = autoencoder.with_arrays(sae, arrays)
  pre_PQ = autoencoder.pre_activations(config, part, x_PD)
  return jax.lax.with_sharding_constraint(pre_PQ, sharding)


def _codes(trained, mesh, x_MD, share_M, prompt_M):
  """Shares of active latents in their prompts' codes, prompts and latents."""
  parts = []
  for start in range(0, len(x_MD), _ENCODED):
    chunk_MD = x_MD[start : start + _ENCODED]
    filled_MD = np.pad(chunk_MD, ((0, _ENCODED - len(chunk_MD)), (0, 0)))
    vals_MK, idx_MK = (
      np.asarray(a)[: len(chunk_MD)]
      for a in _encode(trained.config, mesh, trained.sae, filled_MD)
    )
    row_A, place_A = np.nonzero(vals_MK)
    at_A = start + row_A
    parts.append(
      (
        vals_MK[row_A, place_A] * share_M[at_A],
        prompt_M[at_A],
        idx_MK[row_A, place_A],
      )
    )
  return tuple(np.concatenate(arrays) for arrays in zip(*parts))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(config, mesh, sae, x_MD):
  """Codes of all shards of the latents beside each other, on every device."""

  def of_shard(sae, x_MD):
    vals_MK, idx_MK = autoencoder.encode(config, sae, x_MD, axis='latent')
    first = jax.lax.axis_index('latent') * sae.w_enc_ND.shape[0]
    return vals_MK, idx_MK + first

  split = PartitionSpec(None, 'latent')
  codes = jax.shard_map(
    of_shard,
    mesh=mesh,
    in_specs=(mesh_lib.specs(sae), PartitionSpec()),
    out_specs=(split, split),
    check_vma=False,
  )(sae, x_MD)
  everywhere = NamedSharding(mesh, PartitionSpec())
  return jax.lax.with_sharding_constraint(codes, everywhere)
