"""Values for the settings of a run that are left to it.

A run of at most SHORT_TOKENS tokens begins from rows of its data, with a higher
learning rate that falls to 0. That rests on runs of 0.2 to 4 million tokens,
see docs/results.md. Longer runs take the paper's settings.
"""

import dataclasses
import math

from absl import logging

from sae_jax.training import objective
from sae_jax.training.config import TrainConfig

SHORT_TOKENS = 2**30
# Up to the first number of tokens the learning rate is what was best in short
# runs, from the second on it is the paper's. Between them its logarithm falls
# linearly in the logarithm of the tokens.
_FULL_RATE_TOKENS, _PAPER_TOKENS = 2**20, 2**33
# The paper's: 2e-4 at 2^14 latents, and proportional to 1 / sqrt(n) elsewhere
# (Gao et al. 2024, appendix A.3).
_PAPER_RATE = 2e-4
_PAPER_LATENTS = 2**14
# How often the paper's rate the best one was, at a batch of so many tokens. It
# grew with the batch, about as its root, over these batches.
_SHORT_FACTOR = 10.0
_SHORT_BATCH = 1024
_SHORT_BATCHES = (512, 2048)
# With fewer latents the best rate no longer grew, and 1.4 times it left most
# silent for good. With 256 and 1,024 latents and 2 million tokens that of 2,048
# was the best of those that did not; with 0.2 million it cost under 1 % of the
# FVU. See docs/results.md.
_SHORT_LEAST_LATENTS = 2048
# Where that was measured: latents, active latents, tokens of the run.
_MEASURED = {
  'n_latents': (2048, 8192),
  'k': (16, 32),
  'tokens': (200_000, 20_000_000),
}
_DEAD_AFTER = 10_000_000
_DEAD_SHARE = 1 / 20
_WARMUP_SHARE, _DECAY_SHARE = 1 / 20, 1 / 2
_SHORT_B1 = 0.7


def tokens(config: TrainConfig) -> int:
  """Number of tokens of the run."""
  return config.steps * config.batch_size


def is_short(config: TrainConfig) -> bool:
  """Whether the run takes the settings of short ones.

  They were measured with TopK; baselines with a penalty keep the paper's.
  """
  method = objective.of(config.sae.activation)
  return method.AUXK and tokens(config) <= SHORT_TOKENS


def paper_rate(n_latents: int) -> float:
  """The paper's learning rate, 2e-4 sqrt(2^14 / n)."""
  return _PAPER_RATE * math.sqrt(_PAPER_LATENTS / n_latents)


def learning_rate(config: TrainConfig) -> float:
  """The configured learning rate, or that of the rule if it is 0."""
  if config.optimizer.learning_rate:
    return config.optimizer.learning_rate
  rate = paper_rate(config.sae.n_latents)
  if not objective.of(config.sae.activation).AUXK:
    return rate
  low, high = _SHORT_BATCHES
  batch = min(max(config.batch_size, low), high)
  few = min(1, config.sae.n_latents / _SHORT_LEAST_LATENTS)
  factor = _SHORT_FACTOR * math.sqrt(batch / _SHORT_BATCH * few)
  beyond = math.log(tokens(config) / _FULL_RATE_TOKENS)
  share = 1 - beyond / math.log(_PAPER_TOKENS / _FULL_RATE_TOKENS)
  return rate * factor ** min(1, max(0, share))


def dead_after_tokens(config: TrainConfig) -> int:
  """The configured silence of a dead latent, or a share of the run if 0."""
  share = max(1, int(_DEAD_SHARE * tokens(config)))
  return config.objective.dead_after_tokens or min(_DEAD_AFTER, share)


def resolve(config: TrainConfig, sample_rows: int) -> TrainConfig:
  """The config with a value for everything that is left to the run.

  Args:
    config: the run.
    sample_rows: number of training rows that an autoencoder may start from.
  """
  short = is_short(config)
  sae = config.sae
  start, gain = sae.decoder_init, sae.encoder_gain
  if start == 'auto':
    start = 'data' if short and sae.n_latents <= sample_rows else 'random'
  if gain == 'auto':
    gain = 'least_squares' if short else 'norm'
  values = {}
  if short:
    values = {
      'warmup_steps': int(_WARMUP_SHARE * config.steps),
      'decay_steps': int(_DECAY_SHARE * config.steps),
      'adam_b1': _SHORT_B1,
      'ema_decay': 0.0,
    }
  optimizer = config.optimizer.with_defaults(**values)
  return dataclasses.replace(
    config,
    sae=dataclasses.replace(sae, decoder_init=start, encoder_gain=gain),
    objective=dataclasses.replace(
      config.objective, dead_after_tokens=dead_after_tokens(config)
    ),
    optimizer=dataclasses.replace(
      optimizer, learning_rate=learning_rate(config)
    ),
  )


def log(config: TrainConfig) -> None:
  """Says what a resolved run begins with, and where the rule was not measured.

  Args:
    config: from `resolve`.
  """
  sae, optimizer = config.sae, config.optimizer
  logging.info(
    '%.3g tokens: %s, rate %.3g with %d steps '
    'of warm-up and %d of decay, Adam b1 %g, latents are dead after %d tokens, '
    'average %g',
    tokens(config),
    f'weights from {config.from_checkpoint}'
    if config.from_checkpoint
    else f'decoder from {sae.decoder_init}, encoder gain {sae.encoder_gain}',
    optimizer.learning_rate,
    optimizer.warmup_steps,
    optimizer.decay_steps,
    optimizer.adam_b1,
    config.objective.dead_after_tokens,
    optimizer.ema_decay,
  )


def warn_unmeasured(config: TrainConfig) -> None:
  """Warns if the learning rate is left to the rule where it is extrapolated.

  Args:
    config: the run as it was configured, before `resolve`.
  """
  rule = objective.of(config.sae.activation).AUXK
  given = config.optimizer.learning_rate
  if given or not rule or tokens(config) >= _PAPER_TOKENS:
    return
  values = {
    'n_latents': config.sae.n_latents,
    'k': config.sae.k,
    'tokens': tokens(config),
  }
  outside = [
    f'{name} {values[name]} (measured: {low} to {high})'
    for name, (low, high) in _MEASURED.items()
    if not low <= values[name] <= high
  ]
  if outside:
    logging.warning(
      'the rule for the learning rate is extrapolated to %s: try half and '
      'twice %.3g too, with --learning_rate',
      ', '.join(outside),
      learning_rate(config),
    )
