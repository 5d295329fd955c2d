"""Who is best at each shape, and by how much."""

from collections.abc import Sequence
import dataclasses
from typing import Any

from experiments.peers import grid


def at_best_rate(
  group: grid.Cell, seeds: Sequence[int], results: grid.Results
) -> dict[str, Any] | None:
  """A trainer's figures at the rate that is best on validation rows.

  Args:
    group: a cell without rate and seed.
    seeds: the seeds.
    results: the cells that are done.

  Returns:
    None if no rate is done with every seed. Else its best rate, all rates, and
    whether the best is an end of them; of test rows the FVU of each seed, their
    mean and their spread (the greatest less the least), the mean L0 and the
    mean silent share; the mean silent share of the rows trained on.
  """
  fvus = grid.validation_by_rate(group, seeds, results)
  if not fvus:
    return None
  rate = min(fvus, key=fvus.get)
  cells = [dataclasses.replace(group, rate=rate, seed=seed) for seed in seeds]
  records = [results[cell] for cell in cells]
  of_seeds = [record['test_fvu'] for record in records]
  if None in of_seeds:
    return None

  def mean(name):
    return sum(record[name] for record in records) / len(records)

  return {
    'rate': rate,
    'rates': sorted(fvus),
    'at_edge': rate in (min(fvus), max(fvus)),
    'validation_fvu': fvus[rate],
    'fvu': mean('test_fvu'),
    'fvu_of_seeds': of_seeds,
    'spread': max(of_seeds) - min(of_seeds),
    'l0': mean('test_l0'),
    'silent_of_trained': mean('train_silent'),
    'silent_of_test': mean('test_silent'),
    'versions': sorted({record['version'] for record in records}),
    'devices': sorted({record['device'] for record in records}),
  }


def verdict(ours: dict[str, Any], peers: dict[str, dict]) -> dict[str, Any]:
  """How our FVU compares with that of the best peer.

  Args:
    ours: of `at_best_rate`.
    peers: the same of each peer, by name.

  Returns:
    best_peer; below, how far our mean is below its mean; spread, the larger of
    the two spreads of seeds; wins, the peers whose mean is below ours; clear,
    whether we are below all of them by more than the spread.
  """
  name = min(peers, key=lambda peer: peers[peer]['fvu'])
  below = peers[name]['fvu'] - ours['fvu']
  spread = max(ours['spread'], peers[name]['spread'])
  return {
    'best_peer': name,
    'below': below,
    'spread': spread,
    'wins': sorted(p for p in peers if peers[p]['fvu'] < ours['fvu']),
    'clear': below > spread,
  }


def lines(shape: dict[str, Any], ours: str) -> list[str]:
  """What is shown of a shape.

  Args:
    shape: n, k, tokens, batch, seeds; trainers, by name what `at_best_rate`
      gives; verdict, or None if ours or every peer is not done.
    ours: the name of our trainer.
  """
  out = [
    f'n {shape["n"]:,}, k {shape["k"]}, {shape["tokens"]:,} tokens, batch '
    f'{shape["batch"]:,}, seeds {shape["seeds"]}: test rows at the best rate',
    f'  {"":20} {"FVU":>7} {"spread":>7} {"rate":>8} {"L0":>6} '
    f'{"silent":>7} {"of test":>7}',
  ]
  for name, row in shape['trainers'].items():
    if row is None:
      out.append(f'  {name:20} has no rate at which every seed is done')
      continue
    out.append(
      f'  {name:20} {row["fvu"]:7.4f} {row["spread"]:7.4f} {row["rate"]:8.2g} '
      f'{row["l0"]:6.2f} {row["silent_of_trained"]:7.2%} '
      f'{row["silent_of_test"]:7.2%}'
      + ('  the best rate is an end of its grid' * row['at_edge'])
    )
  result = shape['verdict']
  if result is None:
    out.append('  no comparison yet')
  elif result['wins']:
    out.append(
      f'  {", ".join(result["wins"])} reconstruct better than {ours}, the best '
      f'by {-result["below"]:.4f}; spread of seeds {result["spread"]:.4f}'
    )
  else:
    out.append(
      f'  {ours} is below {result["best_peer"]}, the best peer, by '
      f'{result["below"]:.4f}, {"more" if result["clear"] else "no more"} than '
      f'the spread of seeds {result["spread"]:.4f}'
    )
  return out
