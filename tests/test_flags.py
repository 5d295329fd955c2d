"""What flags take, in process; `test_cli` runs the binaries."""

from absl import flags as absl_flags
import pytest

from sae_jax.cli import flags, harvest, plan, train
from tests import binaries

pytestmark = pytest.mark.fast

BINARIES = {'sae-harvest': harvest, 'sae-plan': plan, 'sae-train': train}
REQUIRED = ['--store=s', '--workdir=w']


def parse(values, *arguments):
  """Parses the arguments of a command."""
  given = [flag for flag in REQUIRED if flag[2:].split('=')[0] in values]
  values(['binary', *given, *arguments])
  return values


@pytest.mark.parametrize(
  ('text', 'value'),
  [
    ('131072', 131072),
    ('1_000_000', 10**6),
    ('1e6', 10**6),
    ('10e9', 10**10),
    ('1.5e3', 1500),
    ('-1', -1),
    ('0', 0),
    # A float of 53 bits would round both.
    ('9007199254740993', 2**53 + 1),
    ('9007199254740.993e3', 2**53 + 1),
    (str(2**63 - 1), 2**63 - 1),
  ],
)
def test_an_integer_is_exact_in_every_spelling(text, value):
  with binaries.defined(lambda: flags.define_integer('many', 7, 'of it')) as f:
    assert parse(f).many == 7
    assert parse(f, f'--many={text}').many == value
    assert type(f.many) is int
    assert f['many'].serialize() == f'--many={value}'


@pytest.mark.parametrize(
  ('text', 'part'),
  [
    ('1.5', 'is not an integer: write 131072, 1_000_000 or 10e9'),
    ('1e-3', 'is not an integer'),
    ('many', 'is not an integer'),
    ('', 'is not an integer'),
    ('inf', 'is not an integer'),
    ('nan', 'is not an integer'),
    ('1e99999999999999999999', 'is not an integer'),
    (str(2**63), 'does not fit into 64 bits'),
    ('1e999999999', 'does not fit into 64 bits'),
  ],
)
def test_what_is_no_integer_is_refused(text, part):
  with binaries.defined(lambda: flags.define_integer('many', 7, 'of it')) as f:
    with pytest.raises(absl_flags.IllegalFlagValueError) as error:
      parse(f, f'--many={text}')
    assert str(error.value).startswith(f'flag --many={text}: {text!r} ')
    assert part in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize('name', BINARIES)
def test_every_integer_of_the_binaries_takes_an_exponent(name):
  with binaries.defined(BINARIES[name].define) as values:
    integers = [
      flag
      for flag in values
      if values[flag].flag_type() == 'int'
      and values.find_module_defining_flag(flag).startswith('sae_jax')
    ]
    assert {
      'sae-harvest': {'n_tokens', 'process_index', 'process_count'},
      'sae-plan': {'tokens', 'num_slices', 'compiles', 'batch_size'},
      'sae-train': {'steps', 'num_processes', 'process_id'},
    }[name] <= set(integers)
    for flag in integers:
      assert parse(values, f'--{flag}=1e3')[flag].value == 1000


def test_absl_takes_no_exponent():
  """Control: an integer flag that is not ours does not pass these tests."""
  with (
    binaries.defined(
      lambda: absl_flags.DEFINE_integer('many', 7, 'of it')
    ) as values,
    pytest.raises(absl_flags.IllegalFlagValueError),
  ):
    parse(values, '--many=1e3')


def test_bounds_of_a_field_hold_for_every_spelling():
  with binaries.defined(train.define) as values:
    parse(values, '--seed=3e9')
    with pytest.raises(ValueError, match='seed 3000000000 must be 2147483647'):
      flags.read(train.TrainConfig)
    parse(values, '--seed=2e9')
    assert flags.read(train.TrainConfig).seed == 2 * 10**9
