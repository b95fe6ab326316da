"""Threads that share atoms: all are waited for, errors come out, nobody else's threads change."""

import multiprocessing
import threading
import time

import pytest
import torch

from md_plugin.kernels import workers
from md_plugin.kernels.workers import share, span


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("n_thread", [1, 2, 5])
def test_each_part_once(n_thread):
    found = [0] * n_thread

    def work(t):
        found[t] += 1

    share(work, n_thread)
    assert found == [1] * n_thread


@pytest.mark.parametrize(("n", "n_thread"), [(0, 2), (1, 3), (10, 3), (7, 7)])
def test_spans_are_contiguous_and_whole(n, n_thread):
    parts = [span(n, t, n_thread) for t in range(n_thread)]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n))
    assert {part.stop - part.start for part in parts} <= {n // n_thread, -(-n // n_thread)}


def test_torch_has_one_thread_in_a_worker_and_its_own_elsewhere():
    torch.set_num_threads(2)
    inside = {}
    share(lambda t: inside.update({t: torch.get_num_threads()}), 2)
    assert inside == {0: 1, 1: 1}
    assert torch.get_num_threads() == 2
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]


def test_one_part_runs_in_the_caller():
    torch.set_num_threads(2)
    where = []
    share(lambda t: where.append((threading.current_thread(), torch.get_num_threads())), 1)
    assert where == [(threading.current_thread(), 2)]


def test_an_error_is_raised_after_all_have_ended():
    ended = []

    def work(t):
        if t == 0:
            raise ZeroDivisionError("part 0")
        time.sleep(0.05)
        ended.append(t)

    with pytest.raises(ZeroDivisionError, match="part 0"):
        share(work, 2)
    assert ended == [1]


def _in_a_fork(queue):
    found = []
    share(found.append, 2)
    queue.put(sorted(found))


def test_a_fork_starts_threads_of_its_own():
    """A pool of the parent has no threads in the child, which would wait for ever."""
    share(lambda t: None, 2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_fork, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == [0, 1]
    child.join(timeout=60)
    assert child.exitcode == 0


def test_threads_are_started_once():
    torch.set_num_threads(2)
    share(lambda t: None, 2)
    misses = workers._pool.cache_info().misses
    for _ in range(3):
        share(lambda t: None, 2)
    assert workers._pool.cache_info().misses == misses
