"""Errors that a user can mend, and what any error says in one line."""


class UserError(ValueError):
  """Input a user can mend; its message is one line: what, numbers, remedy."""


def reason(error: BaseException) -> str:
  """What an error says, without the dump that TensorStore puts after it."""
  said = str(error).partition('\n')[0].partition(' [')[0]
  return said or type(error).__name__
