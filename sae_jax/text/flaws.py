"""Tasks of the data package sae-probes that are flawed."""

from typing import NamedTuple


class Flaw(NamedTuple):
  """What is wrong with a task.

  Attributes:
    reason: in a few words.
    in_prompts: whether the prompts are flawed as text too, or only as a task.
  """

  reason: str
  in_prompts: bool


_KINDS = Flaw(
  'news against web pages and code: the kind of text tells the label, and so '
  'does its length',
  in_prompts=True,
)
# By name, of version 0.4.2.
FLAWED_TASKS = {
  '49_cm_isshort': Flaw('the label is the length of the prompt', False),
  '69_blood-pressure': Flaw('793 of the 3,200 prompts are repeats', True),
  '92_glue_sst2': Flaw(
    'phrases cut from one sentence land on both sides of a split', False
  ),
  '112_amzn_rev': Flaw('prompts and labels are those of 111_yelp_data', True),
  '161_agnews_0': _KINDS,
  '162_agnews_1': _KINDS,
  '163_agnews_2': _KINDS,
}
