"""Measures what the paper says of training, and writes the table.

Each run that is finished is a line of --cells and is never run again; the
effects of each finding are kept in --results, and the page is made of them.

  sae-harvest --store=runs/2m --n_tokens=2300000 --dtype=bfloat16 \\
    --sites=blocks.7.resid_post,blocks.14.resid_post --mask_norm_multiple=10
  python -m experiments.findings.measure --store=runs/2m \\
    --workdir=runs/findings --site=blocks.14.resid_post
"""

from collections.abc import Callable
import dataclasses
import json
import pathlib
from typing import Any

from experiments import runs
from experiments.findings import (
  baselines,
  cells,
  dead,
  evaluated,
  page,
  pairs,
  rates,
)
from experiments.findings.effects import Effect
from experiments.findings.pairs import Budget
from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.cli import huge_pages

_HERE = 'experiments/findings'


@dataclasses.dataclass(frozen=True)
class Finding:
  """A claim, and how it is measured.

  Attributes:
    claim: what the paper says (Gao et al. 2024).
    measure: its effects.
    budget: of its runs.
  """

  claim: str
  measure: Callable[[cells.Study, Budget], list[Effect]]
  budget: Budget = dataclasses.field(default_factory=Budget)


FINDINGS = {
  'relu': Finding(
    'TopK reconstructs better than ReLU with an L1 penalty at equal L0, and '
    'more so with more latents',
    baselines.relu,
    Budget(n_tokens=300_000),
  ),
  'jumprelu': Finding(
    'TopK reconstructs better than JumpReLU at equal L0 (the paper compares '
    'other activations too), and more so with more latents',
    baselines.jumprelu,
    Budget(n_tokens=300_000),
  ),
  'dead': Finding(
    'AuxK and the transposed start keep latents from dying',
    dead.latents,
    Budget(k=16, n_tokens=1_000_000),
  ),
  'average': Finding(
    'A moving average of the weights reconstructs better than the last ones',
    pairs.average,
  ),
  'rate': Finding(
    'The best learning rate falls like 1 / sqrt(n)',
    rates.exponent,
    Budget(n_latents=8192, n_tokens=300_000),
  ),
  'multi': Finding(
    'Multi-TopK makes codes that can be read at any k', pairs.multi_topk
  ),
  'projection': Finding(
    "The decoder's gradient is better without its component along each row",
    pairs.projection,
  ),
  'median': Finding(
    'b_pre begins at the geometric median (beside the mean)', pairs.median
  ),
  'progressive': Finding(
    'Codes of Multi-TopK get better with latents beyond k, and those of TopK '
    'do not',
    evaluated.progressive,
  ),
  'shrinkage': Finding(
    'ReLU with an L1 penalty makes activations smaller than those that '
    'reconstruct best, and TopK does not',
    evaluated.shrinkage,
  ),
  'ablation': Finding(
    'Latents act on fewer logits than channels do', evaluated.ablation
  ),
  'probes': Finding(
    'The best latent tells properties of texts better than the best channel, '
    'and than the best random direction',
    evaluated.probes,
  ),
  'patterns': Finding(
    'Explanations by token patterns have a recall above their precision',
    evaluated.patterns,
  ),
}


@dataclasses.dataclass(frozen=True)
class FindingsConfig(config_lib.Config):
  """Which findings, and where figures are kept."""

  findings: tuple[str, ...] = config_lib.option(
    tuple(FINDINGS), 'which findings, by name'
  )
  cells: str = config_lib.option(
    f'{_HERE}/cells.jsonl', 'file of finished runs, a line each'
  )
  evaluations: str = config_lib.option(
    f'{_HERE}/evaluations.jsonl',
    'file of finished evaluations of runs, a line each',
  )
  results: str = config_lib.option(
    f'{_HERE}/results.json', 'file of effects and verdicts by finding'
  )
  page: str = config_lib.option(
    'experiments/README.md', 'file of the table that is made of them'
  )
  machine: str = config_lib.option(
    'cpu', 'what is written beside figures as the machine'
  )
  site: str = config_lib.option(
    '', "site of the store's activations; may be left out if it has one"
  )


def measure(config: FindingsConfig, store: str, workdir: str) -> dict:
  """Measures the findings and writes results and page; the effects by name.

  Raises:
    UserError: if there is no such finding.
  """
  unknown = sorted(set(config.findings) - set(FINDINGS))
  if unknown:
    raise errors.UserError(
      f'no finding is called {", ".join(unknown)}: '
      f'use some of {", ".join(FINDINGS)}'
    )
  study = cells.Study(
    store,
    workdir,
    config.cells,
    config.evaluations,
    config.machine,
    config.site,
  )
  path = pathlib.Path(config.results)
  results = json.loads(path.read_text()) if path.exists() else {}
  for name in config.findings:
    results[name] = result(FINDINGS[name], study)
    path.write_text(json.dumps(results, indent=1) + '\n')
    text = page.markdown([results[n] for n in FINDINGS if n in results])
    pathlib.Path(config.page).write_text(text)
  return {name: results[name]['effects'] for name in config.findings}


def result(finding: Finding, study: cells.Study) -> dict[str, Any]:
  """A finding's effects with its claim and budget, as they are kept."""
  return {
    'claim': finding.claim,
    'budget': dataclasses.asdict(finding.budget),
    'machine': study.machine,
    'effects': [
      dataclasses.asdict(effect)
      for effect in finding.measure(study, finding.budget)
    ],
  }


def main() -> None:
  """Entry point."""
  runs.run_experiment(FindingsConfig, measure, __doc__)


if __name__ == '__main__':
  huge_pages.use_huge_pages()
  main()
