"""sae-plan: memory and time of a run on TPUs that are not here."""

import sys

from absl import flags as absl_flags
from etils import epath
import jax

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax import plan as plan_lib
from sae_jax.cli import flags
from sae_jax.ops import dispatch
from sae_jax.plan import steps, table
from sae_jax.probing.scan.config import ScanConfig
from sae_jax.training.config import TrainConfig

_EXAMPLES = {
  'top_examples': 'examples of each latent with the highest values',
  'random_examples': 'examples of each latent drawn at random',
  'near_examples': 'near misses of each latent',
}
_SHORT = {'d': 'd_model', 'n': 'n_latents', 'batch': 'batch_size'}


def define() -> None:
  """Defines this binary's flags."""
  flags.define(TrainConfig)
  for short, name in _SHORT.items():
    absl_flags.DEFINE_alias(short, name)
  absl_flags.DEFINE_enum(
    'program',
    steps.training.NAME,
    (steps.training.NAME, steps.probing.NAME),
    'what to plan: a training step, or the step of the pass over a store that '
    'probing makes',
  )
  _define_probing()
  absl_flags.DEFINE_string(
    'topology',
    '',
    'TPU slice to plan for, such as v6e:16x16, or as gcloud names it, such as '
    'v5litepod-16; required',
  )
  flags.define_integer('num_slices', 1, 'number of slices of this topology')
  absl_flags.DEFINE_string(
    'mesh',
    '',
    'shards of the batch and of the latents, such as 4x64, or auto for the '
    'best mesh; if empty, mesh_data and mesh_latent if one of them is given, '
    'otherwise auto',
  )
  absl_flags.DEFINE_enum(
    'implementation',
    None,
    dispatch.IMPLEMENTATIONS,
    'implementation of the sparse products; if left out, the one that training'
    ' would choose',
  )
  absl_flags.DEFINE_enum(
    'dead',
    steps.training.CASES[0],
    steps.training.CASES,
    'number of dead latents that the plan assumes for AuxK: none, few or all',
  )
  flags.define_integer(
    'compiles',
    2,
    'most meshes to compile, the most promising first; if the run does not '
    'fit, also about the number of changes to it that are compiled',
  )
  flags.define_integer(
    'tokens',
    0,
    'number of tokens of the whole run, for its hours and cost; 0 to leave '
    'them out',
  )
  absl_flags.DEFINE_float(
    'price_per_chip_hour',
    0.0,
    'price of a chip for an hour, for the cost of the run; 0 to leave it out',
  )
  absl_flags.DEFINE_string(
    'json', '', 'file to which all figures are written as JSON; empty for none'
  )
  absl_flags.DEFINE_string(
    'emit_hlo',
    '',
    'file to which the text of the compiled program is written; empty for none',
  )


def _define_probing() -> None:
  """Defines the flags of --program=probe alone."""
  sizes = ScanConfig()
  for name, text in _EXAMPLES.items():
    flags.define_integer(
      name, getattr(sizes, name), f'{text}, with --program=probe'
    )
  flags.define_integer(
    'context_length', 1024, 'tokens of a context, with --program=probe'
  )
  flags.define_integer(
    'controls',
    0,
    'number of other autoencoders of this size that test rows are encoded '
    'with, with --program=probe',
  )
  absl_flags.DEFINE_enum(
    'rows',
    steps.probing.CASES[0],
    steps.probing.CASES,
    'rows that the plan assumes with --program=probe: train, which components '
    'are fitted to; test, which are scored; or the first of a pass, which fill '
    'the lists of examples',
  )


def _config_and_case() -> tuple[TrainConfig | steps.probing.PassConfig, str]:
  """The program to plan, and what to assume of data."""
  values, config = absl_flags.FLAGS, flags.read(TrainConfig)
  if values.program == steps.training.NAME:
    return config, values.dead
  scan = ScanConfig(
    batch_rows=config.batch_size,
    **{name: values[name].value for name in _EXAMPLES},
  )
  config = steps.probing.PassConfig(
    sae=config.sae,
    scan=scan,
    batch_size=config.batch_size,
    positions=values.context_length,
    controls=values.controls,
  )
  return config, values.rows


def _mesh() -> str | tuple[int, int]:
  """The mesh that the flags name, or 'auto'."""
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


def _write(path: str, text: str) -> None:
  file = epath.Path(path).expanduser()
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(text)


def work() -> None:
  """Plans as the flags say."""
  # A TPU of this machine stays free for what runs on it.
  jax.config.update('jax_platforms', 'cpu')
  # Programs for chips that are not here can't be read back from a cache.
  jax.config.update('jax_enable_compilation_cache', False)
  values = absl_flags.FLAGS
  if not values.topology:
    raise errors.UserError('topology is not given: write --topology=v6e:16x16')
  config, case = _config_and_case()
  plan = plan_lib.plan(
    config,
    values.topology,
    values.num_slices,
    _mesh(),
    implementation=values.implementation,
    case=case,
    compiles=values.compiles,
    tokens=values.tokens,
    price_per_chip_hour=values.price_per_chip_hour,
    report=lambda line: print(line, file=sys.stderr, flush=True),
  )
  for line in table.lines(plan):
    print(line)
  if values.json:
    _write(values.json, config_lib.to_json(plan.to_dict()))
  if values.emit_hlo:
    _write(values.emit_hlo, plan.text)
