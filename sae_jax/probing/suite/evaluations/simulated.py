"""What predictions rest on when explanations stand in for latents."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import autoencoder, progress
from sae_jax.probing import splicing
from sae_jax.probing.suite import arrays, explained
from sae_jax.probing.suite import context as context_lib
from sae_jax.probing.suite import scored as scored_lib
from sae_jax.probing.suite.context import CannotMeasure, Context
from sae_jax.probing.suite.figures import divided, Sample, Statistic
from sae_jax.probing.suite.outcome import Outcome

TITLE = 'Explanations in place of latents'
ABOUT = """An explanation is good for something if it can stand in for its
latent. The latents that N2G has explained are replaced, those of a draw
together: each has the activation that its token patterns predict where they
match, and none elsewhere. All other latents stay, the reconstruction goes into
the subject in place of the activation, and what that costs is set against the
reconstruction as it is, and against one without these latents at all.

Of the contexts in which one of the latents fires or is predicted, some are
measured: in the others nothing changes. Beside it stand the patterns of another
latent ("of another latent"). Replacing activations by predicted ones and
measuring the error and the loss is Gao et al. (2024), section 4.3; the
ablation, the recovered shares and the control are ours. What to read
is the share that is given back; it says nothing where leaving the latents out
costs nothing, which its interval shows."""
UNIT = 'documents'
ONE_SITE = True
OTHER = 'of another latent'


@dataclasses.dataclass(frozen=True)
class Size(explained.Size):
  """What is measured.

  Attributes:
    contexts: of test text, of each draw.
  """

  contexts: int = 2
  batch_passes: int = 2


SIZES = {
  name: Size(**dataclasses.asdict(size), contexts=contexts)
  for (name, size), contexts in zip(explained.SIZES.items(), (2, 40))
}


def _given_back(what: str):
  """Of what the ablation costs, the share that the explanations don't."""

  def of(sums):
    base = sums[f'{what}: as it is']
    return 1 - divided(
      sums[f'{what}: explained'] - base, sums[f'{what}: without'] - base
    )

  return of


def _cost(what: str, kind: str, per: str):
  return lambda sums: divided(
    sums[f'{what}: {kind}'] - sums[f'{what}: as it is'], sums[per]
  )


STATISTICS = {
  'delta_ce': Statistic(
    'delta CE of the explanations',
    'Cross-entropy with the explained latents replaced, less that with the '
    'reconstruction as it is.',
    _cost('ce', 'explained', 'predictions'),
    'nats',
  ),
  'delta_ce_without': Statistic(
    'delta CE without the latents',
    'The same with these latents left out.',
    _cost('ce', 'without', 'predictions'),
    'nats',
  ),
  'ce_given_back': Statistic(
    'loss given back',
    'Share of the loss that leaving the latents out costs and their '
    'explanations do not: 1 if they are exact, below 0 if they do harm.',
    _given_back('ce'),
    better='high',
  ),
  'fvu': Statistic(
    'FVU of the explanations',
    'Rise of the fraction of variance unexplained with the latents replaced.',
    _cost('error', 'explained', 'variance'),
  ),
  'fvu_without': Statistic(
    'FVU without the latents',
    'Its rise with these latents left out.',
    _cost('error', 'without', 'variance'),
  ),
  'fvu_given_back': Statistic(
    'variance given back',
    'Share of the error that leaving the latents out costs and their '
    'explanations do not.',
    _given_back('error'),
    better='high',
  ),
}


def measure(context: Context) -> Outcome:
  size = SIZES[context.size]
  samples = {}
  for name, own in explained.of(context, size).items():
    guesses = {name: own.patterns}
    if name == context.name:
      guesses[OTHER] = own.patterns[1:] + own.patterns[:1]
    # [U, C, T] of each.
    true_UCT = np.stack(
      [own.activations(place) for place in range(len(own.latents))]
    )
    guesses = {
      kind: np.stack(list(map(own.predictions, patterns)))
      for kind, patterns in guesses.items()
    }
    parts, drawn = {kind: [] for kind in guesses}, []
    with progress.bar(
      total=context.draws, unit='draw', desc=f'simulated: {name}'
    ) as bar:
      for draw in range(context.draws):
        of_draw = own.draw_U == draw
        changed_C = (true_UCT[of_draw] > 0).any((0, 2))
        for guess_UCT in guesses.values():
          changed_C |= (guess_UCT[of_draw] > 0).any((0, 2))
        rng = context.rng('simulated', name, draw)
        chosen = rng.permutation(np.flatnonzero(changed_C))[: size.contexts]
        drawn += [(own.texts.document_C[place], draw) for place in chosen]
        out = _terms(context, name, own, of_draw, guesses, chosen, size)
        for kind, of in out.items():
          parts[kind] += of
        bar.update(1)
    if not drawn:
      raise CannotMeasure(
        f'the explained latents of {name} neither fire nor are predicted on '
        'test text: harvest more text'
      )
    documents, draws = map(np.array, zip(*drawn))
    for kind, of in parts.items():
      samples[kind] = Sample(documents, draws, context_lib.joined(of))
  return Outcome(samples)


def _terms(context, name, own, of_draw, guesses, chosen, size):
  """What some contexts add to the sums, batch by batch, by what predicts."""
  mesh, (shape, sae) = context.mesh, context.scored[name]
  where = context.subject.config, context.site, mesh, context.params
  mean_D = context.mean(name)
  latents = own.latents[of_draw].astype(np.int32)
  out = {kind: [] for kind in guesses}
  put = functools.partial(arrays.on_data, size=size.batch_passes, mesh=mesh)
  for start, stop in arrays.batches(size.batch_passes, len(chosen), mesh):
    batch, count = chosen[start:stop], stop - start
    tokens, kept = (
      put(of[batch]) for of in (own.texts.tokens_CT, own.texts.kept_CT)
    )
    length_B = own.texts.length_C[batch]
    scored_BT = np.arange(1, tokens.shape[1]) < length_B[:, None]
    raw_BTD, log_p_BTV, _ = splicing.read(*where, tokens)
    common = None
    for kind, guess_UCT in guesses.items():
      guess_BTU = guess_UCT[of_draw][:, batch].transpose(1, 2, 0)
      new, errors = _replaced(
        shape, sae, raw_BTD, put(guess_BTU.astype(np.float32)), kept, latents,
        mean_D,
      )  # fmt: skip
      terms = {which: arrays.to_host(of, count) for which, of in errors.items()}
      for which, new_BTD in new.items():
        # What does not depend on predictions is the same for all.
        if common is None or which == 'explained':
          ce, _ = splicing.losses(
            *where, tokens, raw_BTD, log_p_BTV, new_BTD, kept
          )
          ce_BT = np.where(scored_BT, arrays.to_host(ce, count), 0)
          terms[f'ce: {which}'] = ce_BT.astype(np.float64).sum(1)
      terms['predictions'] = scored_BT.sum(1)
      if common is None:
        common = terms
      out[kind].append(common | terms)
  return out


@functools.partial(jax.jit, static_argnums=0)
def _replaced(shape, sae, raw_BTD, guess_BTU, kept_BT, latents, mean_D):
  """Reconstructions as they are, without latents, and with what is predicted.

  Returns:
    The three, raw, and sums over each context's kept tokens: of their squared
    errors in the autoencoder's space, and of the variance there.
  """
  flat_BD = raw_BTD.reshape(-1, raw_BTD.shape[-1])
  x_BD, affine = autoencoder.preprocess(shape.config, sae, flat_BD)
  vals_BK, idx_BK = scored_lib.codes(shape, sae, flat_BD)
  raw_BD = splicing.reconstruction(shape.config, shape.mesh)(sae, flat_BD)
  new_BD = (raw_BD - affine.shift) / affine.scale
  is_of_BKU = idx_BK[:, :, None] == latents
  true_BU = jnp.where(is_of_BKU, vals_BK[:, :, None], 0).max(1)
  rows_UD = scored_lib.rows(shape, sae.w_dec_ND, latents)
  guess_BU = guess_BTU.reshape(true_BU.shape)

  def moved(by_BU):
    return new_BD + jnp.matmul(
      by_BU, rows_UD, precision=jax.lax.Precision.HIGHEST
    )

  every = {
    'as it is': new_BD,
    'without': moved(-true_BU),
    'explained': moved(guess_BU - true_BU),
  }

  def total(of_BD):
    square_BT = jnp.square(of_BD).sum(1).reshape(kept_BT.shape)
    return jnp.where(kept_BT, square_BT, 0).sum(1)

  sums = {f'error: {name}': total(x_BD - of) for name, of in every.items()}
  sums['variance'] = total(x_BD - mean_D)
  restored = {
    name: autoencoder.restore(affine, of).reshape(raw_BTD.shape)
    for name, of in every.items()
  }
  return restored, arrays.whole(sums, shape.mesh)
