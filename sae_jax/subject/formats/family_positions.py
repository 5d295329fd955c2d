"""Rotary positions and attention windows as config.json describes them."""

from collections.abc import Callable
from typing import Any

from sae_jax import errors
from sae_jax.subject import transformer
from sae_jax.subject.formats import settings as settings_lib

Settings = settings_lib.Settings

_SLIDING, _FULL = 'sliding_attention', 'full_attention'
# transformers' default of all families, but for Gemma 3's full attention.
_BASE = 10_000.0


def rope(settings: Settings, old_base: str = 'rope_theta') -> dict[str, Any]:
  """Config fields of rotary positions.

  Args:
    settings: the file's.
    old_base: the key of the wavelengths' base in older files.

  Raises:
    UserError: if the scaling is not supported, or two keys contradict.
  """
  scaled = _one_group(settings)
  # Some releases of transformers wrote GPT-NeoX's base under both names.
  base = _base(settings, scaled, (old_base, 'rope_theta'), _BASE)
  return {
    'rope_base': base,
    'rope_scaling': _scaling(scaled, settings),
    'rope_pairs': 'half',
  }


def rotary_dim(settings: Settings, d_head: int, old_key: str = '') -> int:
  """Coordinates of a head that rotate, 0 for all.

  Args:
    settings: the file's.
    d_head: width of a head.
    old_key: a key of its own that the family has for their share; '' where all
      coordinates rotate.
  """
  groups = [settings, *filter(None, [_one_group(settings)])]
  shares = {
    f'{group.where}: {key}': group.number(key, above=0, most=1)
    for group in groups
    for key in filter(None, ('partial_rotary_factor', old_key))
    if group.says(key)
  }
  default = settings.number(old_key) if old_key else 1.0
  share = settings_lib.agreed(settings.where, shares, default)
  width = int(d_head * share)
  if (not old_key and width != d_head) or width < 2:
    raise errors.UserError(
      f'{settings.where} rotates {width} of {d_head} coordinates of a head: '
      'use a model of this family that rotates '
      + ('at least 2' if old_key else 'all')
    )
  return 0 if width == d_head else width


def gemma_3_rope(settings: Settings) -> dict[str, Any]:
  """Config fields of rotary positions, of full and of sliding attention."""
  both = settings.group('rope_parameters')
  full, local = (both and both.group(kind) for kind in (_FULL, _SLIDING))
  if both:
    both.refuse_unread('a model of two kinds of attention', all_keys=True)
  old = settings.group('rope_scaling')
  if old and full:
    for key, value in old.values.items():
      full.same(key, value)
  if _scaling(local, settings) is not None:
    raise errors.UserError(
      f'{settings.where}: rotary scaling of {_SLIDING} is not supported: '
      f'use a model that scales {_FULL} alone'
    )
  return {
    'rope_base': _base(settings, full, ('rope_theta',), 1e6),
    'rope_scaling': _scaling(old or full, settings),
    'local_rope_base': _base(settings, local, ('rope_local_base_freq',), _BASE),
    'rope_pairs': 'half',
  }


def _one_group(settings: Settings) -> Settings | None:
  """`rope_parameters`, or `rope_scaling` of older files."""
  new, old = (settings.group(k) for k in ('rope_parameters', 'rope_scaling'))
  if new and old:
    settings.same('rope_scaling', settings.values['rope_parameters'])
  return new or old


def _base(
  settings: Settings, group: Settings | None, keys: tuple[str, ...], default
) -> float:
  """The base of the wavelengths, in the group or beside it."""
  said = {
    f'{place.where}: {key}': place.number(key, least=1, most=1e15)
    for place, names in ((group, ('rope_theta',)), (settings, keys))
    for key in dict.fromkeys(names)
    if place and key in place.values
  }
  return settings_lib.agreed(settings.where, said, default)


def _scaling(
  group: Settings | None, settings: Settings
) -> transformer.RopeScaling | None:
  """The stretching of wavelengths that a group describes, None for none."""
  if group is None:
    return None
  old = group.text('type', 'default', null='default')
  kind = group.text('rope_type', old, null=old)
  group.same('type', kind)
  # Read as the base, and as the share of a head.
  group.says('rope_theta', 'partial_rotary_factor')
  scaling = None
  if kind == 'linear':
    scaling = transformer.RopeScaling('linear', group.number('factor', above=0))
  elif kind == 'llama3':
    scaling = _llama_3(group, settings)
  elif kind != 'default':
    raise errors.UserError(
      f'{group.where}: rotary scaling {kind!r} is not supported: use a model '
      'with default, linear or llama3 positions'
    )
  group.refuse_unread(f'rotary scaling {kind!r}', all_keys=True)
  return scaling


def _llama_3(group: Settings, settings: Settings) -> transformer.RopeScaling:
  low = group.number('low_freq_factor', above=0)
  original = 'original_max_position_embeddings'
  lengths = {
    f'{place.where}: {original}': place.whole(original)
    for place in (settings, group)
    if place.says(original)
  }
  return transformer.RopeScaling(
    'llama3',
    group.number('factor', above=0),
    low,
    group.number('high_freq_factor', above=low),
    int(
      settings_lib.agreed(
        settings.where, lengths, settings.whole('max_position_embeddings')
      )
    ),
  )


def windows(
  settings: Settings, n_layers: int, sliding: Callable[[int], bool]
) -> tuple[int, ...]:
  """Each block's window; empty if no block has one.

  Args:
    settings: the file's; a `sliding_window` of null or 0 is none.
    n_layers: blocks.
    sliding: whether block i has a window, where the file has no `layer_types`.

  Raises:
    UserError: if a kind of attention is not supported, or a block that slides
      has no window.
  """
  window = settings.whole('sliding_window', null=0, least=0)
  kinds = layer_types(settings, n_layers)
  if kinds is None:
    kinds = [_SLIDING if sliding(i) else _FULL for i in range(n_layers)]
  elif _SLIDING in kinds and not window:
    raise errors.UserError(
      f'{settings.where} says {_SLIDING} and no sliding_window: '
      'download the model again'
    )
  sizes = tuple(window * (kind == _SLIDING) for kind in kinds)
  return sizes if any(sizes) else ()


def no_windows(settings: Settings, n_layers: int) -> tuple[int, ...]:
  """The windows of a model that does not use them, whatever their size."""
  settings.says('sliding_window', 'max_window_layers')
  if _SLIDING in (layer_types(settings, n_layers) or ()):
    raise errors.UserError(
      f'{settings.where} says {_SLIDING}, and not use_sliding_window: '
      'download the model again'
    )
  return ()


def layer_types(settings: Settings, n_layers: int) -> list[str] | None:
  """The kind of attention of each block; None if the file does not say.

  Raises:
    UserError: if one of them is not supported.
  """
  kinds = settings.entries('layer_types', str, n_layers)
  unknown = set(kinds or ()) - {_SLIDING, _FULL, 'attention'}
  if unknown:
    raise errors.UserError(
      f'{settings.where}: attention of the kind {min(unknown)!r} is not '
      f'supported: use a model of {_FULL} and {_SLIDING}'
    )
  return kinds
