"""Reading activations at a named site of the subject."""

import dataclasses
import re

import jax

from sae_jax import config as config_lib
from sae_jax.subject import transformer

_SITE = re.compile(r'blocks\.(\d+)\.(resid_post)')


@dataclasses.dataclass(frozen=True)
class Site:
  """A place in the subject; `str(site)` is its name.

  Attributes:
    block: 0-based block.
    name: 'resid_post', the residual stream after that block.
  """

  block: int
  name: str

  def __str__(self) -> str:
    return f'blocks.{self.block}.{self.name}'


def parse_site(text: str) -> Site:
  """'blocks.14.resid_post' -> Site(14, 'resid_post').

  Raises:
    UserError: if the text names no kind of site.
  """
  match = _SITE.fullmatch(text)
  if not match:
    raise config_lib.UserError(
      f'site {text!r} is not known: use blocks.N.resid_post, '
      'for example blocks.14.resid_post'
    )
  return Site(int(match[1]), match[2])


def check_site(config: transformer.TransformerConfig, site: Site) -> None:
  """Raises UserError where the subject has no such block."""
  if site.block >= config.n_layers:
    raise config_lib.UserError(
      f'site {site} is beyond the last block of this subject '
      f'({config.n_layers} blocks): use blocks.0.{site.name} '
      f'to blocks.{config.n_layers - 1}.{site.name}'
    )


def capture(
  config: transformer.TransformerConfig,
  params: transformer.Params,
  tokens_BT: jax.Array,
  site: Site,
) -> jax.Array:
  """Activations resid_BTD at a site; runs no block beyond it.

  Args:
    config: the subject's shape, static under jit.
    params: the subject's parameters.
    tokens_BT: int32 token ids, padded on the right with any id.
    site: where to read, static under jit.

  Raises:
    UserError: if the subject has no such block.
  """
  check_site(config, site)
  resid_BTD = transformer.embed(params, tokens_BT)
  return transformer.run_blocks(config, params, resid_BTD, 0, site.block + 1)
