from __future__ import annotations

import os

from sgl.actors.status_page import SchedulerStatus, StatusPage
from sgl.actors.watchdog import Watchdog


def test_both_sides_see_the_same_numbers():
    page = StatusPage.create(["worker0", "scheduler"])
    other = StatusPage(os.dup(page.fd), ["worker0", "scheduler"])
    page.beat("scheduler")
    page.write(SchedulerStatus(num_running_reqs=3, token_usage=0.5))
    assert (other.progress("worker0"), other.progress("scheduler")) == (0, 1)
    assert other.read() == SchedulerStatus(num_running_reqs=3, token_usage=0.5)
    page.close()
    other.close()


def test_a_closed_page_holds_no_descriptor():
    before = len(os.listdir("/proc/self/fd"))
    StatusPage.create(["worker0"]).close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_actor_that_does_not_beat_has_stalled():
    page, now = StatusPage.create(["worker0", "scheduler"]), [0.0]
    watchdog = Watchdog(page, ["worker0", "scheduler"], 10.0, lambda: now[0])
    now[0] = 6.0
    page.beat("scheduler")
    assert watchdog.stalled(share=0.5) == ["worker0"]
    assert watchdog.stalled() == []
    now[0] = 11.0
    assert watchdog.stalled() == ["worker0"]
    page.close()


def test_a_timeout_of_zero_never_stalls():
    page, now = StatusPage.create(["worker0"]), [0.0]
    watchdog = Watchdog(page, ["worker0"], 0.0, lambda: now[0])
    now[0] = 1e9
    assert watchdog.stalled() == []
    page.close()
