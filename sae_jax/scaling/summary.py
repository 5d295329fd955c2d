"""What a terminal shows of fits."""

from collections.abc import Iterator, Sequence

from sae_jax.scaling import cells as cells_lib
from sae_jax.scaling import words
from sae_jax.scaling.findings import number
from sae_jax.scaling.record import PlaceFits


def lines(places: Sequence[PlaceFits]) -> Iterator[str]:
  """What a terminal shows of fits."""
  for fits in places:
    yield f'{cells_lib.place_name(fits.place)}: {len(fits.cells)} runs'
    for item in fits.studies:
      yield f'{item.question.title}'
      if item.law is None:
        yield f'  not fitted: {item.refusal}'
        continue
      for finding in item.findings:
        if finding.refusal:
          yield f'  {finding.refusal}'
        else:
          yield (
            f'  {finding.words}: {number(finding.estimate)} '
            f'({number(finding.low)} to {number(finding.high)})'
          )
        if finding.name in item.further:
          yield f'    {words.of_further(item.further[finding.name])}'
      for left in item.holdouts:
        yield f'  {words.of_holdout(left)}'
    for row in fits.advice:
      yield f'  {words.of_advice(row)}'
