"""What is required of an imported autoencoder, of FVUs that are given."""

import pytest

from experiments.interchange import finetuned

FVU = {'sparsify': 0.3, 'imported': 0.3, 'control': 0.31, 'tuned': 0.25}


def test_the_same_and_lower_after_training_is_right():
  assert finetuned.wrong(FVU) == []
  nearly = 0.3 * (1 + 0.9 * finetuned.MOST)
  assert finetuned.wrong(FVU | {'imported': nearly}) == []


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'imported': 0.3 * (1 + 1.1 * finetuned.MOST)}, 'imported it is 1.1e-05'),
    ({'control': 0.3}, 'the control is not told'),
    ({'tuned': 0.3}, 'training on has not made it lower'),
    ({'tuned': float('nan')}, 'training on has not made it lower'),
    ({'imported': float('nan')}, 'imported it is nan'),
  ],
)
def test_what_does_not_hold_is_named(changes, words):
  assert words in finetuned.wrong(FVU | changes)[0]
