"""An autoencoder on a mesh, as evaluations use it inside jitted functions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from sae_jax import autoencoder, ops
from sae_jax import mesh as mesh_lib
from sae_jax.autoencoder import nonlinearity
from sae_jax.checkpoint import Trained


class Shape(NamedTuple):
  """What functions of an autoencoder are compiled for; static under jit.

  Attributes:
    config: its config.
    mesh: where it lies.
    width: most active latents of a token, K.
  """

  config: autoencoder.SaeConfig
  mesh: Mesh
  width: int


class Scored(NamedTuple):
  """An autoencoder that is scored.

  Attributes:
    shape: see `Shape`.
    sae: its arrays, split over the latents of the mesh.
  """

  shape: Shape
  sae: autoencoder.Sae


def of(trained: Trained, mesh: Mesh, most_active: int) -> Scored:
  """An autoencoder as evaluations use it.

  Args:
    trained: the autoencoder, on the mesh.
    mesh: axes ("data", "latent").
    most_active: active latents of the token with the most, where a token may
      have any number.
  """
  kind = nonlinearity.of(trained.config.activation)
  width = kind.active_per_token(trained.config) or max(1, most_active)
  width = min(width, trained.config.n_latents)
  return Scored(Shape(trained.config, mesh, width), trained.sae)


def codes(
  shape: Shape, sae: autoencoder.Sae, raw_BD: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The active latents of raw activations, as an unsharded one gives them.

  Args:
    shape: its width is K.
    sae: the autoencoder.
    raw_BD: activations; B divides among the shards.

  Returns:
    vals_BK, descending, and idx_BK; where a value is 0 no latent is active.
  """
  n_own = shape.config.n_latents // shape.mesh.shape['latent']

  def local(sae, raw_BD):
    x_BD, _ = autoencoder.preprocess(shape.config, sae, raw_BD)
    vals_BC, idx_BC = autoencoder.encode(shape.config, sae, x_BD, axis='latent')
    vals_BC, idx_BC = _best(vals_BC, idx_BC, shape.width)
    return _of_all_shards(vals_BC, idx_BC, n_own, shape.width)

  return _by_tokens(shape, local, sae, raw_BD)


def _by_tokens(shape, local, sae, raw_BD):
  """What each data shard has of its tokens, the same on all latent shards."""
  tokens = PartitionSpec('data')
  return jax.shard_map(
    local,
    mesh=shape.mesh,
    in_specs=(mesh_lib.specs(sae), tokens),
    out_specs=(tokens, tokens),
    # Every shard of the latents has gathered the same.
    check_vma=False,
  )(sae, raw_BD)


def _of_all_shards(vals_BC, idx_BC, n_own, width):
  """The highest values of all shards, from each shard's own; in shard_map."""
  idx_BC += jax.lax.axis_index('latent') * n_own
  vals_BC, idx_BC = (
    jax.lax.all_gather(of, 'latent', axis=1, tiled=True)
    for of in (vals_BC, idx_BC)
  )
  return _best(vals_BC, idx_BC, width)


def _best(vals_BC, idx_BC, width):
  """The highest values of each token, with their latents."""
  vals_BK, place_BK = ops.top_k(vals_BC, min(width, vals_BC.shape[1]))
  return vals_BK, jnp.take_along_axis(idx_BC, place_BK, axis=1)


def wanted(
  shape: Shape, sae: autoencoder.Sae, raw_BX: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """What is to be reconstructed, and what of it latents must add.

  Args:
    shape: the autoencoder's.
    sae: the autoencoder.
    raw_BX: rows; of a transcoder with what it writes.

  Returns:
    The preprocessed rows, or a transcoder's targets; and those less b_pre and
    a skip; both [B, D].
  """
  tokens_BX, _ = autoencoder.tokens(shape.config, sae, raw_BX)
  x_BD, target_BD = autoencoder.halves(shape.config, tokens_BX)
  left_BD = target_BD - sae.b_pre_D
  if shape.config.skip:
    left_BD -= autoencoder.skipped(shape.config, sae, x_BD)
  return target_BD, left_BD


def rows(shape: Shape, w_ND: jax.Array, idx: jax.Array) -> jax.Array:
  """Rows of an encoder or decoder that is split over the latents.

  Args:
    shape: the autoencoder's.
    w_ND: the matrix.
    idx: latents, of any shape.

  Returns:
    [..., D], the same on every device.
  """
  n_own = shape.config.n_latents // shape.mesh.shape['latent']

  def local(w_ND, idx):
    own = idx - jax.lax.axis_index('latent') * n_own
    is_own = (own >= 0) & (own < n_own)
    own_rows = w_ND[jnp.clip(own, 0, n_own - 1)]
    return jax.lax.psum(jnp.where(is_own[..., None], own_rows, 0), 'latent')

  return jax.shard_map(
    local,
    mesh=shape.mesh,
    in_specs=(mesh_lib.RULES.spec('ND'), PartitionSpec()),
    out_specs=PartitionSpec(),
  )(w_ND, idx)


def ranked(
  shape: Shape, sae: autoencoder.Sae, raw_BD: jax.Array, width: int
) -> tuple[jax.Array, jax.Array]:
  """The largest pre-activations of each token after a ReLU, in order.

  They are what TopK of another k would have taken, whatever the autoencoder's
  own nonlinearity.

  Args:
    shape: the autoencoder's.
    sae: the autoencoder.
    raw_BD: activations; B divides among the shards.
    width: how many, W.

  Returns:
    vals_BW, descending, and their latents.
  """
  n_own = shape.config.n_latents // shape.mesh.shape['latent']
  width = min(width, shape.config.n_latents)

  def local(sae, raw_BD):
    x_BD, _ = autoencoder.preprocess(shape.config, sae, raw_BD)
    vals_BC, idx_BC = ops.encode_topk(
      x_BD,
      sae.w_enc_ND,
      sae.b_lat_N,
      min(width, n_own),
      b_pre_D=autoencoder.input_bias(shape.config, sae),
      dtype=shape.config.matmul_dtype,
    )
    return _of_all_shards(jax.nn.relu(vals_BC), idx_BC, n_own, width)

  return _by_tokens(shape, local, sae, raw_BD)
