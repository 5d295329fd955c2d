"""sae-plan: memory and time of a run on TPUs that are not here."""

import sys

from absl import flags as absl_flags

from sae_jax import errors
from sae_jax import plan as plan_lib
from sae_jax.cli import flags, slice_flags
from sae_jax.ops import dispatch
from sae_jax.plan import steps, table
from sae_jax.probing.scan.config import ScanConfig
from sae_jax.training import given
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
  slice_flags.define('required', 'the best mesh')
  absl_flags.DEFINE_enum(
    'implementation',
    None,
    dispatch.IMPLEMENTATIONS,
    'implementation of the sparse products; if left out, the one that training'
    ' would choose',
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
  values = absl_flags.FLAGS
  config = given.with_its_settings(flags.read(TrainConfig))
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


def work() -> None:
  """Plans as the flags say."""
  slice_flags.prepare()
  values = absl_flags.FLAGS
  if not values.topology:
    raise errors.UserError('topology is not given: write --topology=v6e:16x16')
  config, case = _config_and_case()
  plan = plan_lib.plan(
    config,
    values.topology,
    values.num_slices,
    slice_flags.mesh(),
    implementation=values.implementation,
    case=case,
    compiles=values.compiles,
    tokens=values.tokens,
    price_per_chip_hour=values.price_per_chip_hour,
    report=lambda line: print(line, file=sys.stderr, flush=True),
  )
  for line in table.lines(plan):
    print(line)
  slice_flags.write_json(plan.to_dict())
  if values.emit_hlo:
    slice_flags.write(values.emit_hlo, plan.text)
