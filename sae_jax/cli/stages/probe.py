"""sae-probe: a checkpoint and a store or text -> report.json, features/, plots.

With --text or --latent it prints what is asked instead, and writes nothing.
"""

import sys

from absl import flags as absl_flags

from sae_jax import errors, mesh
from sae_jax.cli import flags
from sae_jax.probing import explain, printed, report, summary


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


def work() -> None:
  """Evaluates or prints as the flags say."""
  values = absl_flags.FLAGS
  if values.text is not None or values.latent is not None:
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
  """The lines for --text or --latent."""
  if values.text is not None and values.latent is not None:
    raise errors.UserError('--text and --latent are two questions: give one')
  # Signs that the terminal's encoding lacks.
  sys.stdout.reconfigure(errors='backslashreplace')
  config = flags.read(report.ProbeConfig)
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
