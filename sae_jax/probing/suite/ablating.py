"""Taking single latents out of the activations that the subject reads."""

from collections.abc import Callable, Iterator
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import autoencoder, progress
from sae_jax.probing import splicing
from sae_jax.probing.suite import arrays
from sae_jax.probing.suite import context as context_lib
from sae_jax.probing.suite import scored as scored_lib
from sae_jax.probing.suite.context import Context
from sae_jax.probing.suite.figures import Sample
from sae_jax.subject import capture


def samples(
  context: Context,
  drawn: context_lib.Tokens,
  chance_C: np.ndarray,
  batch_contexts: int,
  terms: Callable[..., Iterator[tuple[str, dict[str, jax.Array]]]],
  desc: str,
) -> dict[str, Sample]:
  """What ablations add to the sums of each autoencoder, one for each token.

  Args:
    context: the autoencoders.
    drawn: the tokens.
    chance_C: numbers in [0, 1) that choose the latent of each, see `active`.
    batch_contexts: tokens at a time.
    terms: tokens_BT, at_B and chance_B of a batch -> each autoencoder's name,
      with arrays [B] by term, whole on every process.
    desc: label of the progress bar.
  """
  parts = {name: [] for name in context.scored}
  total = len(drawn.at_C) * len(parts)
  with progress.bar(total=total, unit='latent', desc=desc) as bar:
    for start, stop in arrays.batches(
      batch_contexts, len(drawn.at_C), context.mesh
    ):
      batch = (
        arrays.on_data(of_C[start:stop], batch_contexts, context.mesh)
        for of_C in (drawn.tokens_CT, drawn.at_C, chance_C)
      )
      count = stop - start
      for name, of in terms(*batch):
        parts[name].append({t: arrays.to_host(a, count) for t, a in of.items()})
        bar.update(count)
  return context_lib.samples(drawn, parts)


class Active(NamedTuple):
  """Active latents of tokens of a batch of contexts, one of each.

  Attributes:
    idx_B: the latents.
    vals_B: their activations; 0 where the token has none.
    parts_BD: what they add to the reconstruction of the raw activation.
  """

  idx_B: jax.Array
  vals_B: jax.Array
  parts_BD: jax.Array


def at_token(raw_BTD: jax.Array, at_B: jax.Array) -> jax.Array:
  """The activations of one token of each sequence, [B, D]."""
  return jnp.take_along_axis(raw_BTD, at_B[:, None, None], axis=1)[:, 0]


def active(
  shape: scored_lib.Shape,
  sae: autoencoder.Sae,
  raw_BD: jax.Array,
  chance_B: jax.Array,
) -> Active:
  """One of each token's active latents; inside jit.

  Args:
    shape: the autoencoder's.
    sae: the autoencoder.
    raw_BD: the tokens; B divides among the shards.
    chance_B: numbers in [0, 1) that choose among the active ones, evenly.
  """
  vals_BK, idx_BK = scored_lib.codes(shape, sae, raw_BD)
  n_active_B = (vals_BK > 0).sum(1)
  nth_B = (chance_B * n_active_B).astype(jnp.int32)[:, None]
  vals_B = jnp.take_along_axis(vals_BK, nth_B, axis=1)[:, 0]
  idx_B = jnp.take_along_axis(idx_BK, nth_B, axis=1)[:, 0]
  parts_BD = parts(shape, sae, raw_BD, idx_B, vals_B)
  return Active(idx_B, vals_B, parts_BD)


def parts(
  shape: scored_lib.Shape,
  sae: autoencoder.Sae,
  raw_BD: jax.Array,
  idx_B: jax.Array,
  vals_B: jax.Array,
) -> jax.Array:
  """What latents add to the reconstruction of raw activations, [B, D]."""
  _, affine = autoencoder.preprocess(shape.config, sae, raw_BD)
  rows_BD = scored_lib.rows(shape, sae.w_dec_ND, idx_B)
  return affine.scale * vals_B[:, None] * rows_BD


def named(
  shape: scored_lib.Shape,
  sae: autoencoder.Sae,
  raw_BD: jax.Array,
  latent_B: jax.Array,
) -> Active:
  """A latent of each token, which need not be active there; inside jit."""
  vals_BK, idx_BK = scored_lib.codes(shape, sae, raw_BD)
  vals_B = jnp.where(idx_BK == latent_B[:, None], vals_BK, 0).max(1)
  parts_BD = parts(shape, sae, raw_BD, latent_B, vals_B)
  return Active(latent_B, vals_B, parts_BD)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def logits_without(
  choose: Callable[..., Active],
  config: capture.transformer.TransformerConfig,
  site: capture.Site,
  shape: scored_lib.Shape,
  params: capture.transformer.Params,
  sae: autoencoder.Sae,
  tokens_BT: jax.Array,
  raw_BTD: jax.Array,
  at_B: jax.Array,
  by_B: jax.Array,
  at_BS: jax.Array,
) -> tuple[Active, jax.Array]:
  """Logits after one latent of one token is taken out.

  The error of the autoencoder stays: only the latent's part is subtracted.

  Args:
    choose: which latent of each token: `active` or `named`.
    config: the subject's shape.
    site: where the activations are.
    shape: the autoencoder's.
    params: the subject's parameters.
    sae: the autoencoder.
    tokens_BT: token ids.
    raw_BTD: the activations.
    at_B: position of the token.
    by_B: what `choose` chooses by.
    at_BS: positions of which logits are wanted.

  Returns:
    The latents, and logits [B, S, V].
  """
  taken = choose(shape, sae, at_token(raw_BTD, at_B), by_B)
  is_at_BT = jnp.arange(tokens_BT.shape[1]) == at_B[:, None]
  new_BTD = raw_BTD - jnp.where(
    is_at_BT[:, :, None], taken.parts_BD[:, None], 0
  ).astype(raw_BTD.dtype)
  logits = splicing.logits_at(config, site, params, tokens_BT, new_BTD, at_BS)
  return taken, logits


@functools.partial(jax.jit, static_argnums=(0, 1))
def read(
  config: capture.transformer.TransformerConfig,
  site: capture.Site,
  params: capture.transformer.Params,
  tokens_BT: jax.Array,
  at_BS: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """raw_BTD at a site, and the logits [B, S, V] of some positions."""
  raw_BTD = capture.capture(config, params, tokens_BT, site)
  logits = splicing.logits_at(config, site, params, tokens_BT, raw_BTD, at_BS)
  return raw_BTD, logits
