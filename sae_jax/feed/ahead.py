"""Items of an iterator, made ahead by a thread."""

from collections.abc import Generator, Iterator
import queue
import threading
from typing import Any, TypeVar

Item = TypeVar('Item')


def iterate(
  items: Iterator[Item],
  most: int,
  name: str,
  closed: threading.Event | None = None,
) -> Generator[Item, Any, None]:
  """The items, some of which wait for their use.

  Args:
    items: run by the thread alone, and closed by it if it can be.
    most: how many may wait.
    name: of the thread.
    closed: set when the items are not wanted any more; who makes them may look
      at it, for closing waits for the one that is being made.

  Yields:
    The items. What making them raises is raised here, after those that came
    before. Closing the generator ends the thread.
  """
  ready = queue.Queue(maxsize=max(1, most))
  closed = closed or threading.Event()

  def put(item):
    while not closed.is_set():
      try:
        return ready.put(item, timeout=0.1)
      except queue.Full:
        continue

  def work():
    try:
      for item in items:
        put((item, None, False))
        if closed.is_set():
          break
      put((None, None, True))
    except BaseException as error:  # It is raised where the items are used.
      put((None, error, True))
    finally:
      close = getattr(items, 'close', None)
      if close is not None:
        close()

  thread = threading.Thread(target=work, name=name, daemon=True)
  thread.start()
  try:
    while True:
      item, error, end = ready.get()
      if error is not None:
        raise error
      if end:
        return
      yield item
  finally:
    closed.set()
    thread.join()
