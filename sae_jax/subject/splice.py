"""Running the subject on activations that were replaced at a site."""

from collections.abc import Callable

import jax

from sae_jax.subject import capture, transformer


def resume(
  config: transformer.TransformerConfig,
  params: transformer.Params,
  resid_BTD: jax.Array,
  site: capture.Site,
) -> jax.Array:
  """Activations at a site -> next-token logits_BTV.

  `resume` of what `capture` read equals `forward` (`run_blocks` says how
  closely).

  Args:
    config: the subject's shape, static under jit.
    params: the subject's parameters.
    resid_BTD: activations at the site, whole sequences from position 0.
    site: where the activations belong, static under jit.

  Raises:
    UserError: if the subject has no such block.
  """
  capture.check_site(config, site)
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
    replace: resid_BTD -> resid_BTD; the identity changes no logit.

  Raises:
    UserError: if the subject has no such block.
  """
  resid_BTD = capture.capture(config, params, tokens_BT, site)
  return resume(config, params, replace(resid_BTD), site)
