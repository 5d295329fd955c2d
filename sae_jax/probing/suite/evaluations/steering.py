"""What adding a latent's direction makes the subject say, without a judge."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import progress
from sae_jax.probing import lens, splicing, steering
from sae_jax.probing.suite import arrays
from sae_jax.probing.suite.context import CannotMeasure, Context
from sae_jax.probing.suite.figures import ratio, Sample, Statistic
from sae_jax.probing.suite.outcome import Outcome
from sae_jax.subject import capture, generate, logit_lens

TITLE = 'Steering'
ABOUT = """A latent's decoder row, times a multiple of its highest activation,
is added to what the subject reads, and all else is left as it was, the
autoencoder's error too. If the latent stands for something that the subject
uses, the tokens that it votes for by the logit lens become likelier, while the
text stays text.

At each strength stand four things: the latent; the same with the wrong sign; a
random other latent, judged by the first one's tokens; and noise of the same
length. The first measures are of the next token after prompts of test
documents, with the last token's activation steered; the perplexity is of a
continuation whose every token is steered, judged by the subject without
steering. Arad et al. (2025) for the output score."""
UNIT = 'latents'
ONE_SITE = True
WRONG, OTHER, NOISE = 'wrong sign', 'random latent', 'noise'
STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
VOTES = 20


@dataclasses.dataclass(frozen=True)
class Size:
  """What is measured.

  Attributes:
    latents: of each draw.
    prompts: for each latent.
    prompt_tokens: of each prompt.
    new_tokens: that are written after each.
  """

  latents: int
  prompts: int
  prompt_tokens: int = 16
  new_tokens: int = 16


SIZES = {'quick': Size(2, 3, new_tokens=8), 'all': Size(40, 16)}


def _mean(title, definition, term, unit='', better=''):
  return Statistic(
    title, definition, ratio(term, 'latents'), unit, better, 'strength'
  )


STATISTICS = {
  'votes': _mean(
    'votes',
    f'How much the log-probability of the {VOTES} tokens that the latent votes '
    'for, taken together, rises; mean over latents.',
    'votes',
    'nats',
    'high',
  ),
  'output': _mean(
    'output score',
    'Probability of the likeliest of those tokens times 1 less its rank among '
    'all tokens, as a share of the vocabulary.',
    'output',
    better='high',
  ),
  'kl': _mean(
    'KL of steering',
    'KL divergence of the steered prediction from the one without steering.',
    'kl',
    'nats',
  ),
  'confidence': _mean(
    'confidence',
    "How much the likeliest token's probability rises.",
    'confidence',
  ),
  'fluency': _mean(
    'loss of the text',
    'Cross-entropy of the continuation under the subject without steering, '
    'less that of what it writes without steering.',
    'fluency',
    'nats',
    'low',
  ),
}


def measure(context: Context) -> Outcome:
  if not logit_lens.has_logits(context.site):
    raise CannotMeasure(
      f'latents at {context.site} have no votes: it is not in the stream'
    )
  size = SIZES[context.size]
  latents, draws = context.latents(size.latents)
  votes_UV, kinds = directions(context, latents)
  before = Unsteered.of(context, size)
  samples = {}
  with progress.bar(
    total=len(latents) * len(kinds), unit='latent', desc='steering'
  ) as bar:
    for kind, vector_UD in kinds.items():
      terms = []
      for vector_D, votes_V in zip(vector_UD, votes_UV):
        terms.append(before.steered(vector_D, votes_V))
        bar.update(1)
      sums = {
        term: np.array([each[term].mean(1) for each in terms])
        for term in terms[0]
      } | {'latents': np.ones((len(latents), len(STRENGTHS)))}
      samples[kind] = Sample(latents, draws, sums)
  return Outcome(samples, {'strength': np.array(STRENGTHS)})


def directions(
  context: Context, latents: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """What is added to the activations for each latent, and what it votes for.

  Args:
    context: the autoencoder, with the latents' highest activations.
    latents: U of them, two at least.

  Returns:
    The tokens that each votes for, [U, VOTES]; and by kind, the latents
    themselves and the three controls, vectors [U, D] at strength 1.
  """
  rows_UD = context.decoder_rows(latents)
  most_U = context.max_N[latents]
  rng = context.rng('steering')
  other = rng.permutation(len(latents))
  # Never itself.
  other = np.roll(other, 1)[np.argsort(other)]
  noise_UD = rng.standard_normal(rows_UD.shape)
  noise_UD /= np.linalg.norm(noise_UD, axis=1, keepdims=True)
  own_UD = most_U[:, None] * rows_UD
  return _votes(context, rows_UD), {
    context.name: own_UD,
    WRONG: -own_UD,
    OTHER: own_UD[other],
    NOISE: most_U[:, None] * noise_UD,
  }


def _prompts(context: Context, size: Size) -> np.ndarray:
  """The first tokens of contexts of test documents."""
  drawn = context.tokens(size.prompts, size.prompt_tokens - 1, 'prompts')
  return drawn.tokens_CT[: size.prompts, : size.prompt_tokens]


def _votes(context: Context, rows_UD: np.ndarray) -> np.ndarray:
  """The tokens that rows vote for, [U, VOTES]; those that are there."""
  votes = lens.votes(context.subject, context.site, rows_UD, VOTES)
  return np.asarray(votes.up_ids_NV)


@dataclasses.dataclass(frozen=True)
class Unsteered:
  """The prompts and what the subject makes of them without steering."""

  context: Context
  size: Size
  prompts_PT: np.ndarray
  raw_PTD: np.ndarray
  log_p_PV: np.ndarray
  loss: float

  @classmethod
  def of(cls, context: Context, size: Size) -> 'Unsteered':
    """Of prompts that are drawn of test documents."""
    prompts_PT = _prompts(context, size)
    config, site = context.subject.config, context.site
    last_P1 = np.full((len(prompts_PT), 1), prompts_PT.shape[1] - 1, np.int32)
    raw_PTD, log_p_PV = _read(config, site, context.params, prompts_PT, last_P1)
    blank = cls(context, size, prompts_PT, raw_PTD, log_p_PV, 0)
    new_PT = blank.written(prompts_PT)
    return dataclasses.replace(
      blank, loss=blank.loss_of(prompts_PT, new_PT).mean()
    )

  def written(self, prompts_BT, edits=()) -> np.ndarray:
    """What the subject writes after prompts."""
    new_BT = generate.generate(
      self.context.subject.config,
      self.context.params,
      prompts_BT,
      self.size.new_tokens,
      edits=edits,
    )
    return arrays.fetched(new_BT, self.context.mesh)

  def loss_of(self, prompts_BT, new_BT: np.ndarray) -> np.ndarray:
    """Mean cross-entropy of each continuation, without steering."""
    whole_BT = np.concatenate([prompts_BT, new_BT], 1)
    losses_BT = arrays.fetched(
      _losses(self.context.subject.config, self.context.params, whole_BT),
      self.context.mesh,
    )
    return losses_BT[:, prompts_BT.shape[1] - 1 :].mean(1)

  def steered(
    self, vector_D: np.ndarray, votes_V: np.ndarray
  ) -> dict[str, np.ndarray]:
    """What a vector adds to the sums, at each strength.

    Args:
      vector_D: see `directions`.
      votes_V: tokens whose probability is told.

    Returns:
      By term of `STATISTICS`, [len(STRENGTHS), prompts].
    """
    context, config = self.context, self.context.subject.config
    shape, sae = context.itself
    n_strengths, n_prompts = len(STRENGTHS), len(self.prompts_PT)
    # All strengths at once: a sequence for each and each prompt.
    amount_B = np.repeat(np.float32(STRENGTHS), n_prompts)
    push = steering.push(
      shape.config, sae, amount_B[:, None] * np.float32(vector_D)
    )
    prompts_BT, raw_BTD, before_BV = (
      np.tile(of, (n_strengths,) + (1,) * (of.ndim - 1))
      for of in (self.prompts_PT, self.raw_PTD, self.log_p_PV)
    )
    after_BV = arrays.fetched(
      _steered(config, context.site, context.params, prompts_BT, raw_BTD, push),
      context.mesh,
    )
    edit = generate.Edit(context.site, steering.apply, push, False)
    new_BT = self.written(prompts_BT, (edit,))
    terms = {
      'votes': _total(after_BV, votes_V) - _total(before_BV, votes_V),
      'output': _output(after_BV, votes_V),
      'kl': (np.exp(before_BV) * (before_BV - after_BV)).sum(1),
      'confidence': np.exp(after_BV.max(1)) - np.exp(before_BV.max(1)),
      'fluency': self.loss_of(prompts_BT, new_BT) - self.loss,
    }
    return {
      term: np.float64(of_B).reshape(n_strengths, n_prompts)
      for term, of_B in terms.items()
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(config, site, params, tokens_BT, last_B1):
  raw_BTD = capture.capture(config, params, tokens_BT, site)
  logits = splicing.logits_at(config, site, params, tokens_BT, raw_BTD, last_B1)
  return raw_BTD, jax.nn.log_softmax(logits[:, 0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _steered(config, site, params, tokens_BT, raw_BTD, push):
  """Log-probabilities after the last token, whose activation is steered."""
  last_BTD = steering.apply(push, raw_BTD[:, -1:])
  new_BTD = jnp.concatenate([raw_BTD[:, :-1], last_BTD], 1)
  at_B1 = jnp.full((len(tokens_BT), 1), tokens_BT.shape[1] - 1)
  logits = splicing.logits_at(config, site, params, tokens_BT, new_BTD, at_B1)
  return jax.nn.log_softmax(logits[:, 0])


@functools.partial(jax.jit, static_argnums=0)
def _losses(config, params, tokens_BT):
  """Cross-entropy of each next token, [B, T - 1]."""
  logits = capture.transformer.forward(config, params, tokens_BT)
  log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
  return splicing.cross_entropy(log_p, tokens_BT)


def _total(log_p_PV: np.ndarray, votes_V: np.ndarray) -> np.ndarray:
  """Log-probability of some tokens taken together."""
  return np.logaddexp.reduce(log_p_PV[:, votes_V].astype(np.float64), axis=1)


def _output(log_p_PV: np.ndarray, votes_V: np.ndarray) -> np.ndarray:
  """(1 - rank / V) p of the likeliest of some tokens, for each prompt."""
  best_P = log_p_PV[:, votes_V].max(1)
  rank_P = (log_p_PV > best_P[:, None]).sum(1)
  return (1 - rank_P / log_p_PV.shape[1]) * np.exp(best_P)
