"""The tokens that decoder rows vote for (logit lens)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from sae_jax import mesh as mesh_lib
from sae_jax.probing import dots, row_blocks
from sae_jax.subject import logit_lens, sites, Subject


class Votes(NamedTuple):
  """Tokens of each latent, the strongest first, and their logits.

  Attributes:
    up_ids_NV: tokens that it pushes up, int32; -1 where it has no votes.
    up_NV: their logits, less the mean over all tokens.
    down_ids_NV: tokens that it pushes down.
    down_NV: their logits.
  """

  up_ids_NV: jax.Array
  up_NV: jax.Array
  down_ids_NV: jax.Array
  down_NV: jax.Array


def tokens_of(subject: Subject) -> np.ndarray:
  """Which rows of the embedding have a token: bool [V].

  Some models pad their embedding with rows that no text reaches.
  """
  ids = np.fromiter(subject.tokenizer.get_vocab().values(), np.int64)
  is_token_V = np.zeros(subject.config.vocab_size, bool)
  is_token_V[ids[ids < len(is_token_V)]] = True
  return is_token_V


def votes(
  subject: Subject,
  site: sites.Site,
  w_dec_ND: jax.Array | np.ndarray,
  n_votes: int,
  block_rows: int = 0,
) -> Votes:
  """Tokens that each decoder row pushes up and down most (logit lens).

  See `subject.logit_lens` for what a row does to the logits. Rows of the
  embedding that have no token take no part, and each row of logits has its
  mean over the tokens removed.

  Args:
    subject: the model.
    site: where the rows are directions; see `logit_lens.has_logits`.
    w_dec_ND: decoder rows; on a mesh, each device takes a share of them.
    n_votes: tokens up, and as many down; fewer where there are fewer tokens.
      With 0 the subject is not read.
    block_rows: most rows at a time, which bounds the memory at block_rows x V;
      0 for what 128 MiB hold.

  Returns:
    The votes, split over "latent" as the rows are. At a site without votes all
    ids are -1 and all logits 0.

  Raises:
    UserError: if a row, or what it adds to the logits, is not finite.
  """
  w_dec_ND = row_blocks.on_mesh(w_dec_ND)
  mesh = w_dec_ND.sharding.mesh
  if n_votes:
    is_token_V = tokens_of(subject)
    n_votes = min(n_votes, int(is_token_V.sum()))
  if not n_votes or not logit_lens.has_logits(site):
    shape, latents = (len(w_dec_ND), n_votes), mesh_lib.sharding(mesh, 'N')
    ids = jnp.full(shape, -1, jnp.int32, device=latents)
    logits = jnp.zeros(shape, jnp.float32, device=latents)
    return Votes(ids, logits, ids, logits)
  row_blocks.check_decoder(w_dec_ND)
  lens = logit_lens.lens(subject.config, subject.params, site)
  blocks = row_blocks.blocks_of(w_dec_ND, len(is_token_V), block_rows)
  strongest = row_blocks.run(
    functools.partial(_strongest, n_votes),
    blocks,
    'votes',
    *row_blocks.replicated((lens, is_token_V), mesh),
    w_dec_ND,
  )
  remedy = f'weights of {subject.name} are damaged or too large'
  for logits_NV in (strongest.up_NV, strongest.down_NV):
    row_blocks.check_finite(logits_NV, 'votes', remedy)
  return strongest


@functools.partial(jax.jit, static_argnums=(0, 1))
def _strongest(n_votes, blocks, lens, is_token_V, w_dec_ND, call):
  """Votes of the rows of one call."""

  def of_shard(lens, is_token_V, own_ND, call):
    # Logits' mean over the tokens is the logit of the tokens' mean.
    mean_D = lens.unembed_VD.mean(0, jnp.float32, where=is_token_V[:, None])

    def of_block(place_B):
      rows_BD = logit_lens.normed(lens, own_ND[place_B])
      logits_BV = logit_lens.unembedded(lens, rows_BD)
      mean_B1 = dots.dot(rows_BD, mean_D)[:, None]

      def strongest(sign):
        logits, ids = dots.largest(
          *dots.candidates(
            jnp.where(is_token_V, sign * logits_BV, -jnp.inf),
            sign * rows_BD,
            lens.unembed_VD,
            n_votes,
          ),
          n_votes,
        )
        return ids, sign * logits - mean_B1

      return Votes(*strongest(1), *strongest(-1))

    place_GB = blocks.places(call)
    strongest = jax.lax.map(of_block, place_GB)
    return jax.tree.map(lambda a: a.reshape(place_GB.size, n_votes), strongest)

  none = PartitionSpec()
  return jax.shard_map(
    of_shard,
    mesh=blocks.mesh,
    in_specs=(none, none, mesh_lib.RULES.spec('N'), none),
    out_specs=row_blocks.SHARES,
  )(lens, is_token_V, w_dec_ND, call)
