"""Flags of what is planned for slices of TPUs that are not here."""

from typing import Any

from absl import flags as absl_flags
from etils import epath
import jax

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.cli import flags
from sae_jax.plan import steps


def define(topology: str, mesh: str) -> None:
  """Defines the flags.

  Args:
    topology: when the slice is needed, for its help.
    mesh: what 'auto' chooses, for the help.
  """
  absl_flags.DEFINE_string(
    'topology',
    '',
    'TPU slice to plan for, such as v6e:16x16, or as gcloud names it, such as '
    f'v5litepod-16; {topology}',
  )
  flags.define_integer('num_slices', 1, 'number of slices of this topology')
  absl_flags.DEFINE_string(
    'mesh',
    '',
    'shards of the batch and of the latents, such as 4x64, or auto for '
    f'{mesh}; if empty, mesh_data and mesh_latent if one of them is given, '
    'otherwise auto',
  )
  absl_flags.DEFINE_enum(
    'dead',
    steps.training.CASES[0],
    steps.training.CASES,
    'number of dead latents that the plan assumes for AuxK: none, few or all',
  )
  absl_flags.DEFINE_float(
    'price_per_chip_hour',
    0.0,
    'price of a chip for an hour, for the cost; 0 to leave it out',
    lower_bound=0.0,
  )
  absl_flags.DEFINE_string(
    'json', '', 'file to which all figures are written as JSON; empty for none'
  )


def prepare() -> None:
  """Sets JAX up to compile for chips that are not here."""
  # A TPU of this machine stays free for what runs on it.
  jax.config.update('jax_platforms', 'cpu')
  # Programs for chips that are not here can't be read back from a cache.
  jax.config.update('jax_enable_compilation_cache', False)


def mesh() -> str | tuple[int, int]:
  """The mesh that the flags name, or 'auto'.

  Raises:
    UserError: if it is not two numbers.
  """
  values = absl_flags.FLAGS
  text = values.mesh
  if not text:
    given = values['mesh_data'].present or values['mesh_latent'].present
    return (values.mesh_data, values.mesh_latent) if given else 'auto'
  if text == 'auto':
    return text
  data, _, latent = text.partition('x')
  if not (data.isdecimal() and latent.isdecimal()):
    raise errors.UserError(
      f'mesh {text!r} is not two numbers: write data x latent as --mesh=4x64, '
      'or --mesh=auto'
    )
  return int(data), int(latent)


def write_json(figures: dict[str, Any]) -> None:
  """Writes figures to the file that --json names, if it does."""
  path = absl_flags.FLAGS.json
  if path:
    write(path, config_lib.to_json(figures))


def write(path: str, text: str) -> None:
  """Writes a text to a file whose folders may not be there."""
  file = epath.Path(path).expanduser()
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(text)
