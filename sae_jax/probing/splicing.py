"""The subject's predictions with activations at a site replaced."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax import autoencoder
from sae_jax import mesh as mesh_lib
from sae_jax.subject import capture, sharding, splice


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def read(
  config: capture.transformer.TransformerConfig,
  site: capture.Site,
  mesh: jax.sharding.Mesh,
  params: capture.transformer.Params,
  tokens_BT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Activations at a site, and the predictions that follow from them.

  Args:
    config: the subject's shape.
    site: where to read.
    mesh: sequences are split over its data axis.
    params: the subject's parameters, over the mesh.
    tokens_BT: token ids; B divides among the data shards.

  Returns:
    raw_BTD; log-probabilities of the next token, float32 [B, T - 1, V]; and
    its cross-entropy in nats, [B, T - 1], whole on every process.
  """
  contexts = sharding.tokens_sharding(mesh)
  tokens_BT = jax.lax.with_sharding_constraint(tokens_BT, contexts)
  raw_BTD = capture.capture(config, params, tokens_BT, site)
  log_p_BTV = log_probs(config, site, params, tokens_BT, raw_BTD)
  ce_BT = jax.lax.with_sharding_constraint(
    cross_entropy(log_p_BTV, tokens_BT), mesh_lib.sharding(mesh, '')
  )
  return raw_BTD, log_p_BTV, ce_BT


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def activations(
  config: capture.transformer.TransformerConfig,
  site: capture.Site,
  mesh: jax.sharding.Mesh,
  params: capture.transformer.Params,
  tokens_BT: jax.Array,
) -> jax.Array:
  """Activations at a site alone, raw_BTD; arguments as of `read`."""
  contexts = sharding.tokens_sharding(mesh)
  tokens_BT = jax.lax.with_sharding_constraint(tokens_BT, contexts)
  return capture.capture(config, params, tokens_BT, site)


def log_probs(
  config: capture.transformer.TransformerConfig,
  site: capture.Site,
  params: capture.transformer.Params,
  tokens_BT: jax.Array,
  new_BTD: jax.Array,
) -> jax.Array:
  """Log-probabilities [B, T - 1, V] with these activations at the site."""
  if site.name == 'resid_post':
    # All that follows reads the stream alone: less than the whole work.
    logits = splice.resume(config, params, new_BTD, site)
  else:
    logits = splice.splice(config, params, tokens_BT, site, lambda _: new_BTD)
  return jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))


def logits_at(
  config: capture.transformer.TransformerConfig,
  site: capture.Site,
  params: capture.transformer.Params,
  tokens_BT: jax.Array,
  new_BTD: jax.Array,
  at_BS: jax.Array,
) -> jax.Array:
  """Next-token logits of some positions, with these activations at the site.

  Args:
    config: the subject's shape, static under jit.
    site: static under jit.
    params: the subject's parameters.
    tokens_BT: token ids.
    new_BTD: activations of all positions.
    at_BS: the positions.

  Returns:
    Logits [B, S, V], float32.
  """
  transformer = capture.transformer

  def pick(of_BTX):
    return jnp.take_along_axis(of_BTX, at_BS[:, :, None], axis=1)

  if site.name == 'final_norm':
    logits = transformer.project(config, params, pick(new_BTD))
  elif site.name == 'resid_post':
    resid_BTD = transformer.run_blocks(
      config, params, new_BTD, site.block + 1, config.n_layers
    )
    logits = transformer.unembed(config, params, pick(resid_BTD))
  else:
    out = capture.run(
      config, params, tokens_BT, edits={site: lambda _: new_BTD}
    )
    logits = transformer.unembed(config, params, pick(out.resid_BTD))
  return logits.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def losses(
  config: capture.transformer.TransformerConfig,
  site: capture.Site,
  mesh: jax.sharding.Mesh,
  params: capture.transformer.Params,
  tokens_BT: jax.Array,
  raw_BTD: jax.Array,
  log_p_BTV: jax.Array,
  new_BTD: jax.Array,
  kept_BT: Any,
) -> tuple[jax.Array, jax.Array]:
  """Losses where some activations are replaced.

  Args:
    config: see `read`.
    site: see `read`.
    mesh: see `read`.
    params: see `read`.
    tokens_BT: see `read`.
    raw_BTD: from `read`.
    log_p_BTV: from `read`.
    new_BTD: activations, or what broadcasts to them.
    kept_BT: which tokens' activations are replaced by those.

  Returns:
    Cross-entropy of each next token, and KL(original || replaced) of each
    prediction, in nats, [B, T - 1], whole on every process.
  """
  mixed_BTD = jnp.where(kept_BT[:, :, None], new_BTD, raw_BTD)
  new_p_BTV = log_probs(config, site, params, tokens_BT, mixed_BTD)
  ce = cross_entropy(new_p_BTV, tokens_BT)
  kl = (jnp.exp(log_p_BTV) * (log_p_BTV - new_p_BTV)).sum(-1)
  return jax.lax.with_sharding_constraint((ce, kl), mesh_lib.sharding(mesh, ''))


def cross_entropy(log_p_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
  """The loss of each next token, [B, T - 1] in nats."""
  next_BT1 = tokens_BT[:, 1:, None]
  return -jnp.take_along_axis(log_p_BTV, next_BT1, axis=2)[..., 0]


@functools.cache
def reconstruction(
  config: autoencoder.SaeConfig, mesh: jax.sharding.Mesh
) -> Callable[[autoencoder.Sae, jax.Array], jax.Array]:
  """A jitted function of an autoencoder and raw activations, [..., D].

  They are split over the data axis by their first axis, and so are their
  reconstructions, which it returns. Those of a transcoder may be followed by
  what it writes.
  """
  rows = mesh_lib.RULES.spec('BD')
  reconstruct = functools.partial(
    autoencoder.reconstruct, config, axis='latent'
  )

  @jax.jit
  def of_sequences(sae, raw_BTD):
    flat_BD = raw_BTD.reshape(-1, raw_BTD.shape[-1])
    out_BD = jax.shard_map(
      reconstruct,
      mesh=mesh,
      in_specs=(mesh_lib.specs(sae), rows),
      out_specs=rows,
    )(sae, flat_BD)
    return out_BD.reshape(*raw_BTD.shape[:-1], -1)

  return of_sequences
