"""One run by several processes, as `torchrun` or `accelerate launch` start them.

The first process runs the recipe: it alone holds the run's lock, reads, scores and publishes. The others wait until it
calls them `together` for a piece of work, a training stage, and then wait again. They look for its call in the
launcher's key-value store and wait in no collective operation, so the first may take as long as it needs in between.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

from lingraft.errors import RunError

# How often a process that waits looks for its next piece of work. (The store's own wait ends after a time, and lets no
# signal handler run before.)
LOOK_SECONDS = 0.1
# How long processes wait for each other during the work: one of them may have to write a checkpoint to a slow disk.
COLLECTIVE_TIMEOUT = timedelta(minutes=20)

P = ParamSpec("P")
T = TypeVar("T")


def rank() -> int:
    """This process's number in the run; 0 is the first, or the only one."""
    return int(os.environ.get("RANK", "0"))


def launched() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def size() -> int:
    """Processes that are at the same work now: one, except inside of `together`."""
    return launched() if _team is not None and _team.at_work else 1


def led(work: Callable[[], T]) -> T:
    """Do `work` in the first process while the others are at its call; its result is returned in all of them."""
    global _team
    if launched() == 1 or _team is not None:
        return work()
    _team = _Team()
    result: T = _team.lead(work) if rank() == 0 else _team.follow()
    _team.part()
    _team = None
    return result


def together(work: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """Do `work` in every process of the run at the same time; the first one's result is returned.

    What is given has to be picklable. Without `led` around it, this process is alone.

    Raises:
        RunError: another process died meanwhile.
    """
    if _team is None:
        return work(*arguments, **keywords)
    _team.tell("work", (work, arguments, keywords))
    return _team.join_in(work, arguments, keywords)


def speaks() -> bool:
    """Whether this process is the one to name the error that ends the run: the first of them to ask.

    An error of one process ends the others too, with errors that say less.
    """
    return _team is None or _team.first_at("error")


class _Team:
    """The processes of a run, and what the first one tells the others."""

    def __init__(self) -> None:
        import torch
        from torch import distributed

        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        store, number, count = next(distributed.rendezvous("env://"))
        distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=COLLECTIVE_TIMEOUT)
        self.store: Any = distributed.PrefixStore("lingraft", store)
        self.told = 0
        self.at_work = False
        # a launcher ends its processes this way when it is told to stop, or when one of them has died
        signal.signal(signal.SIGTERM, signal.default_int_handler)

    def lead(self, work: Callable[[], T]) -> T:
        try:
            result = work()
        except BaseException:
            self.tell("failed")
            raise
        self.tell("finished", result)
        return result

    def follow(self) -> Any:
        while True:
            news, what = self.hear()
            if news == "finished":
                return what
            if news == "failed":
                raise SystemExit(0)  # the first process has said why
            self.join_in(*what)

    def join_in(self, work: Callable[..., T], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> T:
        self.at_work = True
        try:
            with _one_line_for_a_loss():
                return work(*arguments, **keywords)
        finally:
            self.at_work = False

    def tell(self, news: str, what: Any = None) -> None:
        self.store.set(f"news {self.told}", pickle.dumps((news, what)))
        self.told += 1

    def hear(self) -> tuple[str, Any]:
        key = f"news {self.told}"
        self.told += 1
        with _one_line_for_a_loss():
            while not self.store.check([key]):
                time.sleep(LOOK_SECONDS)
            return pickle.loads(self.store.get(key))

    def first_at(self, what: str) -> bool:
        try:
            return self.store.add(what, 1) == 1
        except RuntimeError:  # the store has died with the process that kept it
            return True

    def part(self) -> None:
        from torch import distributed

        distributed.destroy_process_group()


_team: _Team | None = None


@contextmanager
def _one_line_for_a_loss() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not _lost(error):
            raise
        raise RunError(
            "another process of this run has died; what is finished and the newest checkpoint are kept, and the "
            "same command goes on from there"
        ) from error


def _lost(error: RuntimeError) -> bool:
    """Whether a collective operation failed for want of a process. gloo has no class of errors of its own."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or "gloo" in str(error)
