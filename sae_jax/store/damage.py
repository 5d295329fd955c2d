"""What is damaged among the small files of a store."""

import dataclasses
import functools

import tensorstore as ts

from sae_jax import errors
from sae_jax.storage import sharded
from sae_jax.store import layout
from sae_jax.store.manifest import Manifest, StorePlan


def damaged_files(url: str, manifest: Manifest) -> list[str]:
  """The files that are not what was written, each with the reason.

  Args:
    url: the store's folder.
    manifest: what its other files must agree with.
  """
  checks = {
    layout.PLAN: _check_plan,
    layout.MASK: layout.read_mask,
  }
  for name in layout.array_kinds(manifest):
    checks[f'{name}/{sharded.METADATA}'] = functools.partial(
      _check_metadata, array=name
    )
  for shard in range(len(manifest.shard_counts)):
    checks[layout.shard_name(shard)] = functools.partial(
      layout.read_shard, number=shard
    )
  damaged = []
  for name, check in checks.items():
    try:
      check(url, manifest)
    except errors.UserError as error:
      damaged.append(f'{name} is not what was written ({error})')
  return damaged


def _check_plan(url, manifest):
  plan = layout.read_plan(url)
  if plan is None:
    raise errors.UserError('it is not there')
  for field in dataclasses.fields(StorePlan):
    if field.name not in ('software', 'config') and getattr(
      plan, field.name
    ) != getattr(manifest, field.name):
      raise errors.UserError(f'its {field.name} is not that of the manifest')
  if not plan.config.items() <= manifest.config.items():
    raise errors.UserError('its config is not that of the manifest')


def _check_metadata(url, manifest, *, array):
  """Raises UserError if the `zarr.json` of an array does not describe it."""
  # Read first, since TensorStore's parser has no limit of depth.
  if layout.read_content(url, f'{array}/{sharded.METADATA}') is None:
    raise errors.UserError('it is not there')
  kind, n_shards = (
    layout.array_kinds(manifest)[array],
    len(manifest.shard_counts),
  )
  spec = layout.array_spec(url, array, kind, n_shards)
  # A later version of the store has more shards.
  least, *row = spec['metadata'].pop('shape')
  try:
    stored = ts.open(spec, open=True).result()
  except ValueError as error:
    raise errors.UserError(errors.reason(error)) from error
  if stored.shape[0] < least or list(stored.shape[1:]) != row:
    raise errors.UserError(f'its shape {stored.shape} does not hold the store')
