"""Errors that a user can mend, defects, and any error's message in one line."""


class UserError(ValueError):
  """Input a user can mend; its message is one line: what, numbers, remedy."""


class DefectError(ValueError):
  """A defect of this program that one of its own checks has met; one line."""


def reason(error: BaseException) -> str:
  """The first line of an error, without the dump that TensorStore appends."""
  line = str(error).partition('\n')[0].partition(' [')[0]
  return line or type(error).__name__
