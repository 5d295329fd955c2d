"""Errors that a user can mend, defects, and any error's message in one line."""

# Characters of a message, of which one names a path of 255 and its numbers.
_LONGEST = 1000


class UserError(ValueError):
  """Input a user can mend; its message is one line: what, numbers, remedy.

  What it quotes of a file is made `printable`.
  """

  def __init__(self, message: str = ''):
    super().__init__(printable(message))


class DefectError(ValueError):
  """A defect of this program that one of its own checks has met; one line."""


def printable(text: object, longest: int = _LONGEST) -> str:
  """A text as one line that a terminal shows as it is.

  Args:
    text: the text, which may quote bytes of a file.
    longest: characters that are kept; what is more is cut out of the middle.
  """
  text = str(text)
  if len(text) > longest:
    half = longest // 2
    cut = len(text) - 2 * half
    text = f'{text[:half]}...({cut:,} characters)...{text[-half:]}'
  return ''.join(map(_printable, text))


def _printable(character: str) -> str:
  if character.isprintable():
    return character
  if character.isspace():
    return ' '
  return character.encode('unicode_escape').decode()


def is_failure(error: BaseException) -> bool:
  """Whether it is an error, a panic of a library in Rust among them.

  A panic is none of Python's Exceptions, and neither is Ctrl-C.
  """
  return isinstance(error, Exception) or (
    type(error).__name__ == 'PanicException'
  )


def reason(error: BaseException) -> str:
  """The first line of an error, without the dump that TensorStore appends."""
  line = str(error).partition('\n')[0].partition(' [')[0]
  return printable(line or type(error).__name__)
