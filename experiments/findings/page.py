"""The table of all findings, from their results."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

_HEAD = """# Experiments

| | |
|---|---|
| [quickstart.py](quickstart.py), [colab/](colab/) | the demo, notebooks |
| [findings/](findings/) | what the paper says, measured again: below |
| [short_runs.py](short_runs.py) | what the defaults of short runs are worth |
| [peers/](peers/) | other trainers on the same activations |
| [scaling/](scaling/) | do intervals of scaling laws hold the truth |
| [benchmarks/](benchmarks/) | times and memory on this machine |
| [kernels/](kernels/), [plans/](plans/) | what the TPU compiler says |
| [parity/](parity/) | subjects beside transformers |

What they measured is in [docs/results.md](../docs/results.md).

## Findings

What is so on real activations: an effect's mean, its 95 % interval by
Student's t over the seeds, and a verdict. *Found*: the interval is on the
claim's side of 0 (or holds the number that is claimed, and no end of it is far
from it). *Not found*: all of it is below what would matter. Otherwise the runs
*cannot tell*. All runs have the paper's start and optimiser but for what is
compared. Rates and penalties are chosen on validation rows, effects are those
of test rows.

```sh
sae-harvest --store=runs/2m --n_tokens=2300000 --dtype=bfloat16 \\
  --sites=blocks.7.resid_post,blocks.14.resid_post --mask_norm_multiple=10
python -m experiments.findings.measure --store=runs/2m \\
  --workdir=runs/findings --site=blocks.14.resid_post
```

Runs that are in [cells.jsonl](findings/cells.jsonl) are not run again, nor are
evaluations of [evaluations.jsonl](findings/evaluations.jsonl), made by the
[suite](../docs/evaluation.md) on small samples.
`--findings=projection` measures one.
"""


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
  """The page.

  Args:
    results: of `measure.result`, in the order of the page.
  """
  rows = [
    '| the paper says | measured | mean (95 % interval) | |',
    '|---|---|---|---|',
  ]
  for result in results:
    budget = result['budget']
    shape = (
      f'N {budget["n_latents"]:,}, K {budget["k"]}, '
      f'{budget["n_tokens"]:,} tokens, {budget["seeds"]} seeds'
    )
    rows.append(f'| **{result["claim"]}** ({shape}) | | | |')
    rows += [f'| | {_effect(effect)} |' for effect in result['effects']]
  return f'{_HEAD}\n' + '\n'.join(rows) + '\n'


def _effect(effect: Mapping[str, Any]) -> str:
  unit = f' {effect["unit"]}' if effect['unit'] else ''
  if math.isnan(effect['mean']):
    return f'{effect["name"]} | not measured | {effect["verdict"]}'
  numbers = (
    f'{effect["mean"]:.2f} ({effect["low"]:.2f} to {effect["high"]:.2f})'
  )
  return f'{effect["name"]} | {numbers}{unit} | {effect["verdict"]}'
