"""What a store's descriptions must say to be true of one store."""

from collections.abc import Iterable
import math

from sae_jax import errors
from sae_jax.storage import names
from sae_jax.store import manifest as manifest_lib
from sae_jax.store.manifest import Manifest, Mask, Shard, StorePlan

# Rows of a shard: their places in its stream are int32.
_SHARD_ROWS = 2**31 // manifest_lib.STREAM_PER_ROW
# Bytes of a chunk, which is read whole.
_CHUNK_BYTES = 4 * 2**30


def check_plan(plan: StorePlan | Manifest, where: str = '') -> None:
  """Checks the fields that all shards have in common.

  Args:
    plan: a plan, or the manifest that repeats it.
    where: the file that it was read from; empty for one that is new.

  Raises:
    UserError: if sizes do not fit each other, or a site's name is not a plain
      name.
  """
  before = f'{where}: ' if where else ''
  if plan.chunk_rows < 1 or plan.shard_rows % plan.chunk_rows:
    raise errors.UserError(
      f'{before}shard_rows {plan.shard_rows} must be a multiple of chunk_rows '
      f'{plan.chunk_rows}, which must be 1 or more'
    )
  if not 0 < plan.shard_rows < _SHARD_ROWS:
    raise errors.UserError(
      f'{before}shard_rows {plan.shard_rows} must be from 1 to '
      f'{_SHARD_ROWS - 1}'
    )
  if plan.dtype not in manifest_lib.DTYPES:
    raise errors.UserError(
      f'{before}dtype {plan.dtype!r} cannot be stored: use '
      f'{" or ".join(manifest_lib.DTYPES)}'
    )
  n_bytes = (
    plan.chunk_rows * plan.d_model * manifest_lib.DTYPES[plan.dtype].itemsize
  )
  if not 0 < n_bytes <= _CHUNK_BYTES:
    raise errors.UserError(
      f'{before}a chunk of {plan.chunk_rows} rows of width {plan.d_model} has '
      f'{n_bytes:,} bytes, it must have from 1 to {_CHUNK_BYTES:,}: use other '
      'chunk_rows'
    )
  most = manifest_lib.STREAM_PER_ROW * plan.shard_rows
  if not 0 <= plan.context_length <= most:
    raise errors.UserError(
      f'{before}context_length {plan.context_length} must be from 0 to {most}, '
      'the tokens that a shard has room for'
    )
  # Of a store that holds text alone there are none.
  if len(set(plan.sites)) < len(plan.sites):
    raise errors.UserError(
      f'{before}sites {", ".join(plan.sites)} name one twice: name each once'
    )
  for site in plan.sites:
    names.plain(site, where or 'a site')


def check_shard(
  plan: StorePlan, shard: Shard, arrays: Iterable[str], where: str
) -> None:
  """Raises UserError if the record of a shard does not fit the store's plan.

  Args:
    plan: the plan.
    shard: the record.
    arrays: names of the store's arrays.
    where: the record's file.
  """
  _check_counts(plan, ((shard.rows, shard.stream),), where)
  if not 0 <= shard.contexts <= shard.stream:
    raise _differs(where, f'contexts {shard.contexts} of {shard.stream} tokens')
  rows = sum(n for _, n in shard.documents)
  if rows != shard.rows:
    raise _differs(where, f'rows {shard.rows}, its documents have {rows}')
  lacking = set(arrays) - set(shard.checksums)
  if lacking:
    raise _differs(where, f'no checksum of {", ".join(sorted(lacking))}')


def check_manifest(
  manifest: Manifest, version: int, arrays: Iterable[str], where: str
) -> None:
  """Raises UserError if a manifest contradicts itself.

  Args:
    manifest: the manifest.
    version: version that the file is of, by its name.
    arrays: names of the store's arrays.
    where: the file.
  """
  _check_counts(manifest, manifest.shard_counts, where)
  rows = sum(rows for rows, _ in manifest.shard_counts)
  stream = sum(stream for _, stream in manifest.shard_counts)
  for name, value, right in (
    ('version', manifest.version, version),
    ('n_rows', manifest.n_rows, rows),
    ('n_stream', manifest.n_stream, stream),
  ):
    if value != right:
      raise _differs(where, f'{name} {value}, not {right}')
  if not 0 <= manifest.holdout_rows <= rows:
    raise _differs(where, f'holdout_rows {manifest.holdout_rows} of {rows}')
  n_shards = len(manifest.shard_counts)
  for name in (*arrays, manifest_lib.RECORDS):
    sums = len(manifest.checksums.get(name, ()))
    if sums != n_shards:
      raise _differs(where, f'{sums} checksums of {name}, not {n_shards}')


def check_mask(mask: Mask, of: StorePlan | Manifest, where: str) -> None:
  """Raises UserError if a mask is not of a store, by its plan or manifest."""
  multiple = of.config.get('mask_norm_multiple')
  if not isinstance(multiple, int | float):
    raise _differs(where, f'limits, {multiple!r} is the multiple of the median')
  limits = manifest_lib.make_mask(mask.median_norm, multiple)
  # Older files say infinity where there is no limit.
  stored = tuple(
    None if limit == math.inf else limit for limit in mask.norm_limit
  )
  if (len(stored), stored) != (len(of.sites), limits.norm_limit):
    raise _differs(where, f'limits {mask.norm_limit}, not {limits.norm_limit}')
  medians = dict(zip(of.sites, mask.median_norm))
  if isinstance(of, Manifest) and of.mask.get('median_norm') != medians:
    raise _differs(
      where, f'medians {medians}, the manifest {of.mask.get("median_norm")}'
    )


def _check_counts(plan, counts, where):
  most = manifest_lib.STREAM_PER_ROW * plan.shard_rows
  for number, (rows, stream) in enumerate(counts):
    if not 0 <= rows <= min(stream, plan.shard_rows) or stream > most:
      raise _differs(
        where,
        f'{rows} rows of {stream} tokens in a shard, the {number + 1}. of '
        f'{len(counts)}, which takes {plan.shard_rows} of {most}',
      )


def _differs(where: str, what: str) -> errors.UserError:
  return errors.UserError(
    f'{where} says {what}: it was edited or is damaged: copy the store again, '
    'or harvest it again'
  )
