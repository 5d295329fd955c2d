"""sae-explain: finished results of sae-probe -> explanations with scores.

A language model behind --endpoint explains latents and is scored on other
documents; without an endpoint the requests are written for another tool.
"""

import sys

from sae_jax.cli import flags
from sae_jax.explaining import config, printed, run


def define() -> None:
  """Defines this binary's flags."""
  flags.define(config.ExplainConfig)
  flags.define_url('workdir', 'workdir of a finished sae-probe')
  flags.define_url('checkpoint', 'workdir of the sae-train run that was probed')
  flags.define_url('store', 'store of activations that was probed')


def work() -> None:
  """Explains as the flags say."""
  outcome = run.explain_latents(
    flags.read(config.ExplainConfig),
    flags.url('checkpoint'),
    flags.url('store'),
    flags.url('workdir'),
  )
  # Signs that the terminal's encoding lacks.
  sys.stdout.reconfigure(errors='backslashreplace')
  if isinstance(outcome, run.Waiting):
    print(printed.waiting_line(outcome))
    return
  for line in printed.lines(outcome):
    print(line)
