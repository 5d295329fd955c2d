"""From any format to any other."""

import dataclasses
import os
from typing import Any

from sae_jax import checkpoint, errors
from sae_jax import config as config_lib
from sae_jax import store as store_lib
from sae_jax.interchange import (
  checkpoints,
  formats,
  imported,
  ours,
  registry,
)

AUTO, CHECKPOINT = 'auto', 'checkpoint'
_HUB = 'hf:'


@dataclasses.dataclass(frozen=True)
class ConvertConfig(config_lib.Config):
  """What an autoencoder is converted to, and what its files do not say."""

  format: str = config_lib.option(
    AUTO,
    'format of what is read, a checkpoint or one of '
    f'{", ".join(formats.NAMES)}; auto for what its content says',
  )
  to: str = config_lib.option(
    CHECKPOINT,
    'format of what is written: a checkpoint, which every stage reads, or a '
    'format of others',
  )
  site: str = config_lib.option(
    '',
    'site of --store that the autoencoder reads; may be left out if the store '
    'has only one',
  )
  target_site: str = config_lib.option(
    '', 'site of --store that a transcoder writes'
  )
  k: int = config_lib.option(
    0,
    'number of active latents of a token, of files that do not say it',
    least=0,
  )
  scale_in: float = config_lib.option(
    0.0,
    'what an activation is multiplied by before it is encoded, of files that '
    'do not say it',
    least=0,
  )

  def __post_init__(self):
    super().__post_init__()
    known = CHECKPOINT, *formats.NAMES
    for name, allowed in (('format', (AUTO, *known)), ('to', known)):
      if getattr(self, name) not in allowed:
        raise errors.UserError(
          f'{name} {getattr(self, name)!r} is not allowed: use one of '
          f'{", ".join(allowed)}'
        )


@dataclasses.dataclass(frozen=True)
class Conversion:
  """What was read, and what was written.

  Attributes:
    of: what was read.
    reason: why it is of its format.
    out: what was written.
    to: its format.
    metadata: of a checkpoint that was written; else None.
  """

  of: imported.Imported
  reason: str
  out: str
  to: str
  metadata: checkpoint.Metadata | None


def convert(
  config: ConvertConfig,
  source: str,
  out: str,
  store: str | None = None,
) -> Conversion:
  """Converts an autoencoder to another format, as an equal function.

  Args:
    config: to what, and what the files do not say.
    source: local path or URL of a file, a folder or a workdir of sae-train;
      or hf:ORGANISATION/NAME/FOLDER.
    out: what is written.
    store: activations of its site, for a checkpoint.

  Raises:
    UserError: if the format is not known, or what is read is damaged or cannot
      be written so.
  """
  if config.to != CHECKPOINT:
    registry.check_written(config.to)
  elif not store:
    raise errors.UserError(
      f'{out} is to be a checkpoint, which says of which activations it is: '
      'give --store, a store of sae-harvest of its site'
    )
  source = downloaded(source)
  of, reason = _read(config, source)
  if config.to != CHECKPOINT:
    registry.write(of, config.to, out)
    return Conversion(of, reason, out, config.to, None)
  target = config.target_site
  data = store_lib.open_store(store, config.site, target_site=target)
  metadata = checkpoints.write(of, data, out)
  return Conversion(of, reason, out, config.to, metadata)


def _read(config: ConvertConfig, source: str) -> tuple[imported.Imported, str]:
  """What is there, and why it is of its format."""
  given = imported.Given(k=config.k or None, scale_in=config.scale_in or None)
  if config.format == CHECKPOINT or (
    config.format == AUTO and checkpoint.exists(source)
  ):
    return ours.described(
      checkpoint.opened(source), source
    ), 'it has checkpoints'
  name, reason = config.format, 'it is said to be'
  if name == AUTO:
    name, reason = registry.identify(source)
  of = registry.read(source, given, name)
  for flag in ('k', 'scale_in'):
    asked, own = getattr(given, flag), getattr(of.semantics, flag)
    if asked is not None and own != asked:
      raise errors.UserError(
        f'{source} has {flag} {own} by itself, not {asked}: leave --{flag} out'
      )
  return of, reason


def is_on_hub(source: str) -> bool:
  """Whether a place is on the Hugging Face hub."""
  return source.startswith(_HUB)


def downloaded(source: str) -> str:
  """A local path or URL; of a place on the Hugging Face hub, its download.

  Raises:
    UserError: if it cannot be downloaded; it says how to do so elsewhere.
  """
  if not is_on_hub(source):
    return source
  organisation, name, *folder = [*source.removeprefix(_HUB).split('/'), '']
  repository, path = f'{organisation}/{name}', '/'.join(filter(None, folder))
  by_hand = f'hf download {repository}' + (
    f" --include '{path}*'" if path else ''
  )
  try:
    import huggingface_hub

    place = huggingface_hub.snapshot_download(
      repository, allow_patterns=[path, f'{path}/*'] if path else None
    )
  except ImportError as error:
    raise errors.UserError(
      f'{source} needs huggingface_hub, which is not installed: pip install '
      f'it, or download elsewhere ({by_hand}) and give the folder'
    ) from error
  except Exception as error:  # Of the network, of many types.
    raise errors.UserError(
      f'{source} cannot be downloaded ({errors.reason(error)}): where there is '
      f'a network, {by_hand}, and give the folder'
    ) from error
  return os.path.join(place, path)


def lines(conversion: Conversion) -> list[str]:
  """What was done, for a person."""
  of, semantics = conversion.of, conversion.of.semantics
  about: list[Any] = [
    f'{of.n_latents:,} latents of width {of.d_in:,}',
    semantics.nonlinearity + (f' (k {semantics.k})' if semantics.k else ''),
  ]
  if semantics.normalisation != 'none':
    about.append(f'normalisation {semantics.normalisation}')
  if 'w_skip_DD' in of.tensors:
    about.append('a skip')
  said = [
    f'{name} {value}'
    for name, value in (
      ('model', of.provenance.model),
      ('site', of.provenance.site),
      ('target site', of.provenance.target_site),
    )
    if value
  ]
  result = [
    f'{of.url} is {of.format}: {conversion.reason}',
    ', '.join(about),
    'it says: ' + (', '.join(said) or 'nothing of what it was trained on'),
  ]
  if conversion.metadata is not None:
    dataset = conversion.metadata.dataset
    result.append(
      f'{conversion.out}: a checkpoint of {dataset["site"]} of '
      f'{dataset["subject"]}, as the store says'
    )
  else:
    result.append(f'{conversion.out}: {conversion.to}')
  return result
