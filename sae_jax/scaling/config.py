"""What a fit of scaling laws may be told."""

import dataclasses

from sae_jax import config as config_lib
from sae_jax import errors


@dataclasses.dataclass(frozen=True)
class FitConfig(config_lib.Config):
  """Fitting a table of cells.

  Raises:
    UserError: if a value is not allowed.
  """

  starts: int = config_lib.option(
    64, 'number of starts of each fit, a power of 2', least=64
  )
  draws: int = config_lib.option(
    400, 'number of draws of the bootstrap over seeds, then cells', least=20
  )
  seed: int = config_lib.option(0, 'seed of starts and draws', least=0)
  confidence: float = config_lib.option(
    0.95, 'confidence of the intervals', least=0.5, most=0.999
  )
  widest: float = config_lib.option(
    0.5,
    'width of an interval, as a share of its value, beyond which the value is '
    'not named',
    least=0.01,
  )
  predict_n: tuple[str, ...] = config_lib.option(
    (),
    'numbers of latents whose loss is predicted; if empty, 4 and 16 times the '
    'largest that was run',
  )
  budget_flops: float = config_lib.option(
    0.0, 'advise for this many dense-equivalent FLOPs, 6 n d T', least=0
  )
  budget_hours: float = config_lib.option(
    0.0, 'advise for this many hours of --chips; needs --tokens_per_second',
    least=0,
  )  # fmt: skip
  budget_money: float = config_lib.option(
    0.0,
    'advise for this much money; needs --price_per_chip_hour and '
    '--tokens_per_second',
    least=0,
  )
  chips: int = config_lib.option(1, 'number of chips of the run', least=1)
  price_per_chip_hour: float = config_lib.option(
    0.0, 'price of a chip for an hour, in the unit of --budget_money', least=0
  )
  tokens_per_second: float = config_lib.option(
    0.0,
    'tokens a second of one chip, as sae-plan says or as measured, at '
    '--speed_n_latents',
    least=0,
  )
  speed_n_latents: int = config_lib.option(
    0, 'number of latents at which --tokens_per_second holds', least=0
  )

  def __post_init__(self):
    super().__post_init__()
    if self.starts & (self.starts - 1):
      raise errors.UserError(
        f'starts {self.starts} must be a power of 2: use 64 or 128'
      )
    budgets = [
      name
      for name in ('budget_flops', 'budget_hours', 'budget_money')
      if getattr(self, name)
    ]
    if len(budgets) > 1:
      raise errors.UserError(f'{" and ".join(budgets)} are given: give one')
    needed = {
      'budget_hours': ('tokens_per_second', 'speed_n_latents'),
      'budget_money': (
        'tokens_per_second', 'speed_n_latents', 'price_per_chip_hour',
      ),
    }  # fmt: skip
    for budget in budgets:
      for name in needed.get(budget, ()):
        if not getattr(self, name):
          raise errors.UserError(f'{budget} needs {name}: give --{name}')
    self.predicted()

  def predicted(self) -> tuple[int, ...]:
    """`predict_n` as numbers."""
    try:
      sizes = tuple(int(float(text)) for text in self.predict_n)
    except (ValueError, OverflowError):
      sizes = (0,)
    if any(size < 1 for size in sizes):
      raise errors.UserError(
        f'predict_n {",".join(self.predict_n)} is no list of numbers of '
        'latents: write --predict_n=65536,1048576'
      )
    return sizes

  def flops(self, d_model: int) -> float:
    """The budget in dense-equivalent FLOPs; 0 if none is given.

    Hours and money become FLOPs by the speed that the user gives, taken as the
    same number of FLOPs a second at other sizes.
    """
    hours = self.budget_hours * self.chips
    if self.budget_money:
      hours = self.budget_money / self.price_per_chip_hour
    if not hours:
      return self.budget_flops
    speed = 6.0 * self.speed_n_latents * d_model * self.tokens_per_second
    return 3600.0 * hours * speed
