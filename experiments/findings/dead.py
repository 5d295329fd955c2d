"""AuxK and the transposed start against dead latents.

All four combinations, on the same batches; where neither is used more than a
fifth of the latents should be silent, or there is little to find.
"""

from experiments.findings import cells, effects
from experiments.findings.cells import Study
from experiments.findings.effects import Effect
from experiments.findings.pairs import Budget, run

# In percent of all latents.
_LEAST_SHARE = 1.0
ARMS = {
  'both': {},
  'AuxK alone': {'encoder_init': 'independent'},
  'transposed start alone': {'k_aux': 0},
  'neither': {'k_aux': 0, 'encoder_init': 'independent'},
}
# A latent that was silent for this share of the run is dead for AuxK.
_DEAD_SHARE = 1 / 20


def latents(study: Study, budget: Budget) -> list[Effect]:
  """Shares of silent latents, and what each remedy takes from them."""
  of = cells.lines(
    study,
    {
      (arm, seed): run(
        budget,
        seed,
        dead_after_tokens=int(_DEAD_SHARE * budget.n_tokens),
        # The paper has none.
        warmup_steps=0,
        **fields,
      )
      for arm, fields in ARMS.items()
      for seed in range(budget.seeds)
    },
  )
  seeds = range(budget.seeds)

  def share(arm):
    return [100 * of[arm, seed]['silent'] for seed in seeds]

  def less(arm, beside):
    return [b - a for a, b in zip(share(arm), share(beside))]

  return [
    effects.above(name, 'points', values, _LEAST_SHARE)
    for name, values in (
      ('silent with neither', share('neither')),
      ('silent with both', share('both')),
      ('fewer with AuxK alone, by', less('AuxK alone', 'neither')),
      (
        'fewer with the transposed start alone, by',
        less('transposed start alone', 'neither'),
      ),
      ('fewer with both than with AuxK alone, by', less('both', 'AuxK alone')),
      (
        'fewer with both than with the transposed start alone, by',
        less('both', 'transposed start alone'),
      ),
    )
  ]
