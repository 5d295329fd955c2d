"""sae-probe: a checkpoint and a store or text -> report.json, features/, plots.

With --text, --latent, --compare or one of the --export flags it does what is
asked instead, and evaluates nothing.
"""

import sys

from absl import flags as absl_flags

from sae_jax import errors, mesh
from sae_jax.cli import flags
from sae_jax.dashboards import bundle, latent_cache
from sae_jax.dashboards.config import DashboardConfig
from sae_jax.features import export, results
from sae_jax.probing import explain, printed, report, summary
from sae_jax.probing.suite import compare

# Flags that ask for lines to be printed.
_QUESTIONS = (
  'text',
  'latent',
  'compare',
  'export',
  'export_neuronpedia',
  'export_delphi',
)


def define() -> None:
  """Defines this binary's flags."""
  flags.define(report.ProbeConfig)
  flags.define_processes()
  flags.define_url(
    'checkpoint', 'workdir of the sae-train run to evaluate', required=False
  )
  flags.define_url(
    'store',
    'store of activations that the run was trained on; none with --stream',
    required=False,
  )
  flags.define_url(
    'workdir', 'folder to which the results are written', required=False
  )
  absl_flags.DEFINE_string(
    'text',
    None,
    'a text: print the active latents of each of its tokens, the strongest '
    'first, and evaluate nothing; needs --checkpoint, and --workdir with '
    'finished results for what the latents are about',
  )
  flags.define_integer(
    'text_latents',
    8,
    'number of latents printed for a token of --text; 0 for all active ones',
  )
  flags.define_integer(
    'latent',
    None,
    'number of a latent: print what the finished results in --workdir say of '
    'it, and evaluate nothing',
  )
  absl_flags.DEFINE_list(
    'compare',
    None,
    'workdirs of sae-probe with a --suite: print the differences of their '
    'autoencoders, pair by pair, with 95 % intervals, and evaluate nothing',
  )
  absl_flags.DEFINE_string(
    'export',
    None,
    'a .csv or .parquet file: write the feature table of the finished results '
    'in --workdir to it, a line for each latent, and evaluate nothing',
  )
  flags.define_url(
    'export_neuronpedia',
    'folder: write the finished results in --workdir to it as Neuronpedia '
    'imports them, and evaluate nothing',
    required=False,
  )
  flags.define_url(
    'export_delphi',
    "folder: write delphi's latent cache to it, of the finished results in "
    '--workdir, their --checkpoint and --store, and evaluate nothing',
    required=False,
  )
  flags.define(DashboardConfig)


def work() -> None:
  """Evaluates or prints as the flags say."""
  values = absl_flags.FLAGS
  if any(getattr(values, name) is not None for name in _QUESTIONS):
    for line in _asked(values):
      print(line)
    return
  mesh.start_processes(
    values.coordinator, values.num_processes, values.process_id
  )
  figures = report.probe(
    flags.read(report.ProbeConfig),
    flags.url('checkpoint'),
    flags.url('store') if values.store is not None else None,
    flags.url('workdir'),
  )
  for line in summary.lines(figures):
    print(line)


def _asked(values: absl_flags.FlagValues) -> list[str]:
  """The lines for one of the questions."""
  asked = [name for name in _QUESTIONS if getattr(values, name) is not None]
  if len(asked) > 1:
    raise errors.UserError(
      f'{" and ".join(f"--{name}" for name in asked)} are {len(asked)} '
      'questions: give one'
    )
  # Signs that the terminal's encoding lacks.
  sys.stdout.reconfigure(errors='backslashreplace')
  if values.compare is not None:
    return compare.lines(compare.compare(values.compare))
  config = flags.read(report.ProbeConfig)
  if asked[0].startswith('export'):
    return [_exported(values, config)]
  columns = printed.width()
  if values.latent is not None:
    latent = explain.read_latent(
      flags.url('workdir'), values.latent, config.subject
    )
    return list(printed.latent_lines(latent, columns))
  if values.text_latents < 0:
    raise errors.UserError(
      f'text_latents {values.text_latents} must be 0 or more'
    )
  explanation = explain.explain(
    values.text,
    flags.url('checkpoint'),
    flags.url('workdir') if values.workdir is not None else None,
    config.subject,
    most=values.text_latents,
    average=config.average,
  )
  return list(printed.text_lines(explanation, columns))


def _exported(values: absl_flags.FlagValues, config: report.ProbeConfig) -> str:
  """What has been written for other programs, as a line."""
  workdir = flags.url('workdir')
  if values.export is not None:
    export.check(values.export)
    features = results.open_features(workdir, results.read_report(workdir))
    export.export(features, values.export)
    return f'{values.export}: {features.n_latents:,} latents'
  names = flags.read(DashboardConfig)
  if values.export_neuronpedia is not None:
    written = bundle.write(
      names, workdir, flags.url('export_neuronpedia'), config.subject
    )
    return (
      f'{written.folder}: {written.latents:,} latents, '
      f'{written.explanations:,} of them explained'
    )
  written = latent_cache.write(
    names,
    workdir,
    flags.url('checkpoint'),
    flags.url('store'),
    flags.url('export_delphi'),
    config.batch_rows,
  )
  return (
    f'{written.folder}: {written.activations:,} activations on '
    f'{written.tokens:,} tokens'
  )
