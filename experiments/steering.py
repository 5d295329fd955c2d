"""What the subject writes while latents are steered, and what that does.

For each latent: the text after prompts without steering and with it, and at
each strength how much likelier the tokens become that it votes for, beside the
three controls of the suite, with 95 % intervals over prompts of test documents.
The probing results say what a latent's highest activation is, and its examples
what it stands for: `sae-probe --workdir=P --latent=719`.

  python -m experiments.steering --checkpoint=runs/demo/train \\
    --store=runs/demo/store --probe=runs/demo/probe \\
    --latents=719,700,2753 --prompts='My favourite thing is,She wants to know'
"""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np
from scipy import stats

import sae_jax
from sae_jax import checkpoint as checkpoint_lib
from sae_jax import mesh as mesh_lib
from sae_jax import store as store_lib
from sae_jax.cli import flags, huge_pages
from sae_jax.probing import steering as steering_lib
from sae_jax.probing.suite import context as context_lib
from sae_jax.probing.suite import scored as scored_lib
from sae_jax.probing.suite.evaluations import steering
from sae_jax.subject.formats import tokenizer as tokenizer_lib

_MEAN_ROWS = 8192
_SHOWN_VOTES = 6


@dataclasses.dataclass(frozen=True)
class SteeringConfig(sae_jax.Config):
  """Which latents are steered, and how."""

  latents: tuple[str, ...] = sae_jax.option(
    ('719', '700', '2753'),
    'latents, two at least: each is the control of another',
  )
  prompts: tuple[str, ...] = sae_jax.option(
    ('My favourite thing is', 'She wants to know'), 'prompts that are continued'
  )
  strengths: tuple[str, ...] = sae_jax.option(
    ('1', '2', '4'),
    "strengths of the texts, in units of the latent's highest activation",
  )
  n_new: int = sae_jax.option(24, 'tokens that are written', least=1)
  test_prompts: int = sae_jax.option(
    32, 'prompts of test documents on which probabilities are measured', least=2
  )
  seed: int = sae_jax.option(0, 'seed of what is drawn')

  def __post_init__(self):
    super().__post_init__()
    try:
      _ = self.numbers, self.multiples
    except ValueError as error:
      raise sae_jax.UserError(
        f'{error}: write --latents=719,700 --strengths=1,2'
      ) from error

  @property
  def numbers(self) -> list[int]:
    """The latents."""
    return list(map(int, self.latents))

  @property
  def multiples(self) -> list[float]:
    """The strengths of the texts."""
    return list(map(float, self.strengths))


def measure(
  config: SteeringConfig, checkpoint: str, store: str, probe: str
) -> str:
  """The texts and the table, in Markdown.

  Raises:
    UserError: if there is no such latent, or one never fired.
  """
  trained = checkpoint_lib.load(checkpoint)
  data = store_lib.open_store(store, trained.metadata.dataset['site'])
  subject = sae_jax.load_subject(data.manifest.subject)
  max_N = sae_jax.open_features(f'{probe}/features').column('max')
  latents = np.array(config.numbers)
  _check(latents, max_N)
  context = _context(config, trained, data, subject, max_N)
  votes_UV, kinds = steering.directions(context, latents)
  size = steering.Size(len(latents), config.test_prompts)
  before = steering.Unsteered.of(context, size)
  parts = []
  for at, latent in enumerate(latents.tolist()):
    votes = [
      tokenizer_lib.decode(subject.tokenizer, [token])
      for token in votes_UV[at, :_SHOWN_VOTES].tolist()
    ]
    texts = _texts(config, subject, trained, latent, float(max_N[latent]))
    likelier = {
      kind: before.steered(vector_UD[at], votes_UV[at])['votes']
      for kind, vector_UD in kinds.items()
    }
    parts.append(_section(config, latent, votes, texts, likelier))
  return '\n'.join(parts)


def _check(latents: np.ndarray, max_N: np.ndarray) -> None:
  if len(latents) < 2:
    raise sae_jax.UserError(
      'each latent is the control of another: give two with --latents'
    )
  for latent in latents.tolist():
    if not 0 <= latent < len(max_N):
      raise sae_jax.UserError(
        f'there is no latent {latent}: give 0 to {len(max_N) - 1}'
      )
    if max_N[latent] <= 0:
      raise sae_jax.UserError(
        f'latent {latent} never fired: give another with --latents'
      )


def _context(config, trained, data, subject, max_N) -> context_lib.Context:
  """What the suite's evaluation of steering is given."""
  mesh = mesh_lib.one_device()
  sample = data.finite_rows(0, min(data.n_train, _MEAN_ROWS))
  return context_lib.Context(
    scored={'latent': scored_lib.of(trained, mesh, trained.config.n_latents)},
    subject=subject,
    store=data,
    mesh=mesh,
    mean_D=sample.mean(0),
    seed=config.seed,
    size='quick',
    max_N=max_N,
  )


def _texts(config, subject, trained, latent, most) -> dict[float, list[str]]:
  """What is written after the prompts by strength, 0 for without steering."""
  return {
    strength: steering_lib.steer(
      subject,
      trained,
      {latent: strength * most},
      config.prompts,
      n_new=config.n_new,
    )
    for strength in (0.0, *config.multiples)
  }


def _section(
  config: SteeringConfig,
  latent: int,
  votes: Sequence[str],
  texts: dict[float, list[str]],
  likelier: dict[str, np.ndarray],
) -> str:
  """A latent's part of the page."""
  lines = [
    f'### Latent {latent}',
    '',
    'It votes for ' + ', '.join(f'`{vote.strip()}`' for vote in votes) + '.',
    '',
    '| strength | text |',
    '|---|---|',
  ]
  for strength, of_prompts in texts.items():
    name = f'{strength:g} x' if strength else 'none'
    for prompt, text in zip(config.prompts, of_prompts):
      lines.append(f'| {name} | **{prompt}**{_cell(text)} |')
  lines += [
    '',
    f'| log-probability of its {steering.VOTES} votes rises by, in nats | '
    + ' | '.join(f'{strength:g} x' for strength in steering.STRENGTHS)
    + ' |',
    '|---' * (len(steering.STRENGTHS) + 1) + '|',
  ]
  for kind, of_SP in likelier.items():
    lines.append(f'| {kind} | ' + ' | '.join(map(_interval, of_SP)) + ' |')
  return '\n'.join([*lines, ''])


def _cell(text: str) -> str:
  """Text for a cell of a table."""
  return text.replace('\n', ' ').replace('|', '\\|')


def _interval(values: np.ndarray) -> str:
  """Mean and half of its 95 % interval by Student's t."""
  half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1)
  return f'{values.mean():.2f} ± {half / math.sqrt(len(values)):.2f}'


def main() -> None:
  """Entry point."""
  flags.define(SteeringConfig)
  flags.define_url('checkpoint', 'workdir of a training run')
  flags.define_url('store', 'store of activations that it was trained on')
  flags.define_url('probe', 'workdir of its probing')

  def work():
    print(
      measure(
        flags.read(SteeringConfig),
        flags.url('checkpoint'),
        flags.url('store'),
        flags.url('probe'),
      )
    )

  flags.run(work, __doc__)


if __name__ == '__main__':
  huge_pages.use_huge_pages()
  main()
