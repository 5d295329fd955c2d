"""The lines and the report of explanations, with the controls beside them."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

import sae_jax
from sae_jax.explaining import asking, examples, scores
from sae_jax.explaining.config import ExplainConfig, Protocol
from sae_jax.explaining.examples import Drawn
from sae_jax.explaining.scores import Score

# Of the config, what makes two reports comparable.
_PROTOCOL = (
  'model',
  'settings',
  'logprobs',
  'texts_per_request',
  'permutations',
  'rows',
  'window',
  'least_examples',
)
_RANKED = 10
CONTROLS = {
  'other': 'the same texts judged by the explanation of another latent of '
  'similar density',
  'tokens': 'no language model: a text is judged active if it has one of the '
  'tokens on which the latent is active most often in documents of the '
  'explainer',
  'compared': 'the explanations of another workdir, given by --compare',
}
_DEFINITIONS = {
  **scores.DEFINITIONS,
  **{f'control {name}': text for name, text in CONTROLS.items()},
  **{f'class {name}': text for name, text in examples.NEGATIVES.items()},
}
Judged = Mapping[tuple[int, int], np.ndarray]


def make(
  config: ExplainConfig,
  protocol: Protocol,
  probed: Mapping[str, Any],
  drawn: Mapping[int, Drawn],
  explained: Mapping[int, str],
  p_XO: Judged,
  asked: asking.Read | None,
  judged: asking.Read,
  density_N: np.ndarray,
  mass_N: np.ndarray,
  other: tuple[dict[str, Any], dict[int, dict[str, Any]]] | None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """The lines of explanations.jsonl and explain_report.json.

  Args:
    config: options.
    protocol: how many texts.
    probed: the report of sae-probe.
    drawn: texts by latent, of the skipped ones none.
    explained: explanations by latent.
    p_XO: see `asking.probabilities`.
    asked: answers to requests of explanations; None if they were imported.
    judged: answers to requests of detection.
    density_N: share of tokens on which each latent is active.
    mass_N: sum of each latent's activations.
    other: report and lines of explanations to compare with.
  """
  own = _scores(drawn, p_XO, lambda n, m: n == m)
  controls = {
    'other': _scores(drawn, p_XO, lambda n, m: n != m),
    'tokens': _scores(
      drawn, {(n, n): _has_token(drawn[n]) for n in own}, lambda n, m: True
    ),
  }
  moved = dict(zip(own, scores.shrunk(list(own.values())).tolist()))
  partner = {n: m for n, m in p_XO if n != m}
  lines = [
    {
      'latent': n,
      'explanation': explained.get(n),
      'model': '' if asked is None else config.model,
      'judge': config.model,
      'density': float(density_N[n]),
      'skipped': one.skipped,
      'score': _entry(own.get(n), dataclasses.asdict, shrunk=moved.get(n)),
      'controls': {
        name: _entry(controls[name].get(n), _main, **more)
        for name, more in (
          ('other', {'latent': partner.get(n)}),
          ('tokens', {'tokens': list(one.tokens)}),
        )
      },
    }
    for n, one in drawn.items()
  ]
  protocol_used = _protocol(config, protocol)
  record = {
    'sae_fingerprint': probed['made_from']['sae_fingerprint'],
    'store': probed['made_from'].get('store'),
    'subject': probed['subject'],
    'site': probed['site'],
    'imported': asked is None,
    'protocol': protocol_used,
    'latents_seed': config.seed,
    'counts': _counts(drawn, explained, own, mass_N),
    'figures': _figures(own)
    | {
      'by_document': scores.by_document(
        [(drawn[n].scored, p_XO[n, n]) for n in own]
      )
    },
    'controls': {name: _control(own, of) for name, of in controls.items()}
    | {'compared': other and _compared(protocol_used, own, *other)},
    'failures': {'explain': _failures(asked), 'detect': _failures(judged)},
    'own_probabilities': asking.own_share(judged),
    'ranked': _ranked(moved, explained),
    'definitions': _DEFINITIONS,
    'versions': {'sae_jax': sae_jax.__version__},
  }
  return lines, record


def _has_token(drawn: Drawn) -> np.ndarray:
  return scores.has_token(drawn.scored, drawn.tokens)


def _failures(read: asking.Read | None) -> dict[str, Any] | None:
  return read and {'asked': read.asked, 'by_kind': read.failures}


def _scores(drawn, p_XO: Judged, wanted) -> dict[int, Score]:
  """The scores of those pairs that are wanted and have one, by latent."""
  of = {
    n: scores.score(drawn[n].scored, p)
    for (n, m), p in p_XO.items()
    if wanted(n, m)
  }
  return {n: score for n, score in of.items() if score is not None}


def _entry(score: Score | None, of, **more) -> dict[str, Any] | None:
  return None if score is None else {**of(score), **more}


def _main(score: Score) -> dict[str, Any]:
  return {
    'balanced_accuracy': score.balanced_accuracy,
    'auroc': score.auroc,
  }


def _protocol(config: ExplainConfig, protocol: Protocol) -> dict[str, Any]:
  values = {name: getattr(config, name) for name in _PROTOCOL}
  return values | dataclasses.asdict(protocol)


def _counts(drawn, explained, own, mass_N) -> dict[str, Any]:
  reasons = [one.skipped for one in drawn.values()]
  latents = np.array(list(drawn), np.int64)
  is_skipped = np.array([bool(reason) for reason in reasons])
  mass = float(mass_N[latents].sum())
  return {
    'latents': len(drawn),
    'skipped': {
      reason: reasons.count(reason) for reason in (examples.FEW, examples.DENSE)
    },
    'skipped_mass': (
      float(mass_N[latents[is_skipped]].sum()) / mass if mass else None
    ),
    'explained': len(explained),
    'scored': len(own),
  }


def _figures(own: Mapping[int, Score]) -> dict[str, Any]:
  """Means over latents; lists and mappings of them where there are several."""

  def mean(of):
    return scores.mean({n: of(score) for n, score in own.items()})

  return {
    'balanced_accuracy': mean(lambda s: s.balanced_accuracy[0]),
    'auroc': mean(lambda s: s.auroc[0]),
    'sensitivity': mean(lambda s: s.sensitivity[0]),
    'specificity': mean(lambda s: s.specificity[0]),
    'consistency': mean(lambda s: s.consistency),
    'answered': mean(lambda s: s.answered),
    'by_tenth': [
      mean(lambda s, tenth=tenth: s.by_tenth[tenth])
      for tenth in range(examples.TENTHS)
    ],
    'by_class': {
      kind: mean(lambda s, kind=kind: s.by_class[kind])
      for kind in examples.NEGATIVES
    },
  }


def _main_values(of: Mapping[int, Score], name: str) -> dict[int, float]:
  return {n: getattr(score, name)[0] for n, score in of.items()}


def _control(own, control) -> dict[str, Any]:
  """A control's means, and how far the explanations are above it."""
  out = {}
  for name in ('balanced_accuracy', 'auroc'):
    values = _main_values(control, name)
    above = scores.difference(_main_values(own, name), values, paired=True)
    out[name] = scores.mean(values) | {'above': above}
  return out


def _compared(protocol, own, report, lines) -> dict[str, Any]:
  """How far the explanations are above those of another workdir."""
  theirs = {
    n: line['score']['balanced_accuracy'][0]
    for n, line in lines.items()
    if line.get('score')
  }
  values = _main_values(own, 'balanced_accuracy')
  return {
    'balanced_accuracy': scores.mean(theirs)
    | {'above': scores.difference(values, theirs, paired=False)},
    'same_protocol': report.get('protocol') == protocol,
    'sae_fingerprint': report.get('sae_fingerprint'),
  }


def _ranked(moved: Mapping[int, float], explained) -> dict[str, Any]:
  """The best and the worst explained latents."""
  order = sorted(moved, key=lambda n: -moved[n])

  def entries(latents):
    return [
      {'latent': n, 'shrunk': moved[n], 'explanation': explained[n]}
      for n in latents
    ]

  return {
    'best': entries(order[:_RANKED]),
    'worst': entries(order[::-1][:_RANKED]),
  }
