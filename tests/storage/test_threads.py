"""Work that is shared out to threads: all of it is done, whatever happens to the threads."""

import concurrent.futures
import threading

import pytest

from flax_ckpt.storage import files


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_each_item_once(count: int) -> None:
    done: list[int] = []
    files.in_threads(3, done.append, range(count))
    assert sorted(done) == list(range(count))


def test_it_is_done_side_by_side() -> None:
    meeting = threading.Barrier(4, timeout=60)
    files.in_threads(3, lambda _: meeting.wait(), range(4))
    assert meeting.n_waiting == 0


@pytest.mark.parametrize("bad", [0, 1, 7])
def test_an_error_is_raised_when_no_work_goes_on_any_more(bad: int) -> None:
    before = threading.enumerate()

    def work(item: int) -> None:
        if item == bad:
            raise OSError(f"item {item}")

    with pytest.raises(OSError, match=f"item {bad}"):
        files.in_threads(3, work, range(8))
    assert set(threading.enumerate()) <= set(before)


def test_after_an_error_no_more_work_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    shutdown, told, done = concurrent.futures.ThreadPoolExecutor.shutdown, threading.Event(), []

    def telling(pool: concurrent.futures.ThreadPoolExecutor, *given: bool, **options: bool) -> None:
        shutdown(pool, **options | {"wait": False})
        told.set()
        shutdown(pool, *given, **options)

    def work(item: int) -> None:
        if item == 0:
            raise OSError("item 0")
        told.wait(60)
        done.append(item)

    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "shutdown", telling)
    with pytest.raises(OSError, match="item 0"):
        files.in_threads(2, work, range(100))
    assert set(done) <= {1, 2}


@pytest.mark.parametrize("taken", [0, 3])
def test_what_executors_refuse_is_done_here(monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    submit, given, here = concurrent.futures.ThreadPoolExecutor.submit, list[int](), list[int]()

    def ending(pool: concurrent.futures.ThreadPoolExecutor, work: object, item: int) -> object:
        if len(given) == taken:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        given.append(item)
        return submit(pool, work, item)  # type: ignore[arg-type]

    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", ending)
    own = threading.get_ident()
    done: list[int] = []

    def work(item: int) -> None:
        (here if threading.get_ident() == own else done).append(item)

    files.in_threads(4, work, range(8))
    assert given == sorted(done) == list(range(1, taken + 1))
    assert here == [0, *range(taken + 1, 8)]
