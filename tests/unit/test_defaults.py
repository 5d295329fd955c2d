"""What is left to a run: rate, schedule, start, silence of dead latents."""

import dataclasses

from absl import logging
import numpy as np
import pytest

from sae_jax import errors
from sae_jax.autoencoder import SaeConfig
from sae_jax.training import defaults
from sae_jax.training.config import TrainConfig
from sae_jax.training.objective import ObjectiveConfig
from sae_jax.training.optimizer import OptimizerConfig

# The paper's largest: 16 million latents, 40 billion tokens.
LARGEST = TrainConfig(
  sae=SaeConfig(d_model=768, n_latents=2**24, k=256),
  batch_size=2**17,
  steps=305_176,
)
PAPER = {
  'learning_rate': 2e-4 / 2**5,
  'warmup_steps': 0,
  'decay_steps': 0,
  'clip_norm': 0.0,
  'adam_b1': 0.9,
  'adam_b2': 0.999,
  'adam_eps': 6.25e-10,
  'ema_decay': 0.999,
}


def run(tokens, batch_size=1024, **sae):
  return TrainConfig(
    sae=SaeConfig(d_model=8, **({'n_latents': 4096, 'k': 32} | sae)),
    batch_size=batch_size,
    steps=tokens // batch_size,
  )


def test_the_largest_run_has_the_papers_settings():
  config = defaults.resolve(LARGEST, 2**15)
  got = dataclasses.asdict(config.optimizer)
  for name, want in PAPER.items():
    np.testing.assert_allclose(got[name], want, rtol=1e-12, err_msg=name)
  assert config.objective.dead_after_tokens == 10_000_000
  assert config.sae.decoder_init == 'random'
  assert config.sae.encoder_gain == 'norm'
  # Even if its rows were enough: then it is too long.
  assert defaults.resolve(LARGEST, 2**25).sae.decoder_init == 'random'
  # Control: a short run of the same shape has other settings.
  short = dataclasses.replace(LARGEST, steps=100)
  assert defaults.resolve(short, 2**15).optimizer.adam_b1 != 0.9


@pytest.mark.parametrize(
  ('n', 'want'), [(2**14, 2e-4), (2**12, 4e-4), (2**16, 1e-4)]
)
def test_the_papers_rate_is_inverse_to_the_root_of_latents(n, want):
  np.testing.assert_allclose(defaults.paper_rate(n), want, rtol=1e-12)


def test_the_rate_falls_from_that_of_short_runs_to_the_papers():
  rates = [defaults.learning_rate(run(2**e)) for e in range(18, 36)]
  np.testing.assert_allclose(rates[:3], 4e-3, rtol=1e-12)
  np.testing.assert_allclose(rates[-3:], 4e-4, rtol=1e-12)
  between = np.diff(np.log(rates[2:16]))
  np.testing.assert_allclose(between, np.log(0.1) / 13, rtol=1e-9)


@pytest.mark.parametrize(
  ('batch', 'factor'), [(256, 0.5**0.5), (512, 0.5**0.5), (2048, 2**0.5),
                        (4096, 2**0.5), (65_536, 2**0.5)]
)  # fmt: skip
def test_the_rate_grows_as_the_root_of_measured_batches(batch, factor):
  got = defaults.learning_rate(run(2**20, batch))
  np.testing.assert_allclose(got, 4e-3 * factor, rtol=1e-12)


def test_a_baseline_keeps_the_papers_settings():
  config = defaults.resolve(run(2**20, activation='relu'), 2**15)
  assert config.optimizer.learning_rate == defaults.paper_rate(4096)
  assert config.optimizer.adam_b1 == 0.9
  assert config.sae.encoder_gain == 'norm'
  topk = defaults.resolve(run(2**20), 2**15)
  assert topk.optimizer.learning_rate != defaults.paper_rate(4096)


def test_what_is_configured_stays():
  config = dataclasses.replace(
    run(2**20, decoder_init='random', encoder_gain='norm'),
    optimizer=OptimizerConfig(
      learning_rate=1e-3, warmup_steps=0, decay_steps=7, adam_b1=0.0,
      ema_decay=0.5,
    ),
    objective=ObjectiveConfig(dead_after_tokens=77),
  )  # fmt: skip
  assert defaults.resolve(config, 2**15) == config
  # Control: everything else is replaced, and only once.
  resolved = defaults.resolve(run(2**20), 2**15)
  assert resolved != run(2**20)
  assert defaults.resolve(resolved, 2**15) == resolved


def test_too_few_rows_give_a_random_start():
  assert defaults.resolve(run(2**20), 4096).sae.decoder_init == 'data'
  few = defaults.resolve(run(2**20), 4095).sae
  assert (few.decoder_init, few.encoder_gain) == ('random', 'least_squares')


def test_silence_is_a_share_of_the_run_up_to_the_papers():
  assert defaults.dead_after_tokens(run(2**20)) == 2**20 // 20
  assert defaults.dead_after_tokens(run(2**30)) == 10_000_000
  assert defaults.dead_after_tokens(run(1024)) == 51


@pytest.mark.parametrize('name', ['adam_b1', 'ema_decay'])
def test_a_negative_decay_is_refused(name):
  with pytest.raises(errors.UserError, match=f'{name} -0.5 must be -1, or 0'):
    OptimizerConfig(**{name: -0.5})


def test_an_extrapolated_rate_is_warned_of(caplog, monkeypatch):
  monkeypatch.setattr(logging.get_absl_logger(), 'propagate', True)
  defaults.warn_unmeasured(run(2**20))
  assert not caplog.records
  defaults.warn_unmeasured(run(2**16, n_latents=64, k=4))
  (record,) = caplog.records
  line = record.getMessage()
  for part in ('n_latents 64 (measured: 2048 to 8192)', 'k 4', 'tokens 65536'):
    assert part in line
  caplog.clear()
  given = dataclasses.replace(
    run(2**16), optimizer=OptimizerConfig(learning_rate=1e-3)
  )
  defaults.warn_unmeasured(given)
  defaults.warn_unmeasured(LARGEST)
  # It is the paper's for a baseline.
  defaults.warn_unmeasured(run(2**16, n_latents=64, activation='relu'))
  assert not caplog.records


def test_fewer_latents_than_were_measured_have_no_higher_rate():
  def rate(n_latents, tokens, batch_size=1024):
    config = run(tokens, batch_size)
    sae = dataclasses.replace(config.sae, n_latents=n_latents)
    return defaults.learning_rate(dataclasses.replace(config, sae=sae))

  assert rate(256, 2**18) == pytest.approx(rate(2048, 2**18))
  # Control: more than that do have a higher one.
  assert rate(2048, 2**18) == pytest.approx(2**0.5 * rate(4096, 2**18))
  # At 2 million tokens 0.0068 and 0.0065 were best, and 1.4 times that did not
  # learn.
  assert rate(256, 2_070_000, 2048) == pytest.approx(0.0068, rel=0.05)
  assert rate(1024, 2_070_000, 2048) == pytest.approx(0.0065, rel=0.05)
  # The paper's grow on.
  assert rate(256, 2**33) == defaults.paper_rate(256) == 2**3 * 2e-4
