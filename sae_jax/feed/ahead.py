"""Making the items of an iterator ahead, in a thread."""

from collections.abc import Generator, Iterator
import queue
import threading
from typing import Any, TypeVar

Item = TypeVar('Item')


def iterate(
  items: Iterator[Item],
  max_ahead: int,
  name: str,
  closed: threading.Event | None = None,
) -> Generator[Item, Any, None]:
  """The items of an iterator, made ahead of their use.

  Args:
    items: the iterator; a thread runs it and, if it can be closed, closes it.
    max_ahead: how many finished items may wait.
    name: name of the thread.
    closed: set when no more items are needed. An iterator that takes long may
      look at it, since closing waits for the item being made.

  Yields:
    The items. An error in making one is raised after the items before it.
    Closing the generator ends the thread.
  """
  ready = queue.Queue(maxsize=max(1, max_ahead))
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
