"""Running the subject with activations replaced at sites."""

from collections.abc import Callable

import jax

from sae_jax import errors
from sae_jax.subject import capture, transformer


def resume(
  config: transformer.TransformerConfig,
  params: transformer.Params,
  resid_BTD: jax.Array,
  site: capture.Site,
) -> jax.Array:
  """The residual stream after a block -> next-token logits_BTV.

  `resume` of the activations that `capture` read equals `forward`, as closely
  as `run_blocks` says.

  Args:
    config: the subject's shape, static under jit.
    params: the subject's parameters.
    resid_BTD: activations at the site, whole sequences from position 0.
    site: the resid_post where the activations belong, static under jit.

  Raises:
    UserError: if the subject has no such block, or the site is no resid_post.
  """
  capture.check_site(config, site)
  if site.name != 'resid_post':
    raise errors.UserError(
      f'a pass cannot go on from {site} alone: use a resid_post, or '
      'splice.splice, which runs the whole'
    )
  resid_BTD = transformer.run_blocks(
    config, params, resid_BTD, site.block + 1, config.n_layers
  )
  return transformer.unembed(config, params, resid_BTD)


def splice(
  config: transformer.TransformerConfig,
  params: transformer.Params,
  tokens_BT: jax.Array,
  site: capture.Site,
  replace: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """Next-token logits_BTV with the activations at a site replaced.

  Args:
    config: the subject's shape, static under jit.
    params: the subject's parameters.
    tokens_BT: int32 token ids, padded on the right with any id.
    site: where to replace, static under jit.
    replace: activations -> activations; the identity changes no logit.

  Raises:
    UserError: if the subject has no such site.
  """
  return splice_many(config, params, tokens_BT, {site: replace})


def splice_many(
  config: transformer.TransformerConfig,
  params: transformer.Params,
  tokens_BT: jax.Array,
  edits: capture.Edits,
) -> jax.Array:
  """Next-token logits_BTV with the activations at several sites replaced.

  Each edit sees the effects of the edits before it.

  Args:
    config: the subject's shape, static under jit.
    params: the subject's parameters.
    tokens_BT: int32 token ids, padded on the right with any id.
    edits: site -> function of its activations.

  Raises:
    UserError: if the subject has no such site.
  """
  out = capture.run(config, params, tokens_BT, edits=edits, logits=True)
  return out.logits_BTV
