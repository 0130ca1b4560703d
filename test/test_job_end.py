"""How jobs end: which of several events is the cause, what is said of it, and the exit code."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest

from bactrian.driver.launch.job_end import Failure, JobEnd, Loss, told

FAILED = Failure("rank 0 on a (process 7)", 1, "ValueError: boom\n")
LOST = Loss(1, "rank 1 on b (process 8), in step 3 or soon after")
END = JobEnd(num_ranks=2, num_reported=2, code=1)
KILLED = 128 + signal.SIGKILL


def test_ranks_that_fail_alike_are_told_of_once() -> None:
    wrong = [Failure(f"rank {rank} on a (process {rank + 7})", 3, "error: unknown strategy\n") for rank in (2, 0, 1)]
    lost = Failure("rank 3 on b (process 5)", 1, "error: lost\n")
    assert told([wrong[0], lost, *wrong[1:]]) == [
        ("rank 3 on b (process 5) failed:", "error: lost\n"),
        ("rank 2 on a (process 9) and 2 more failed:", "error: unknown strategy\n"),
    ]
    found = Failure("rank 0 on a (process 7)", 6, "error: rank 1 has ended its program\n")
    assert told([found]) == [("rank 0 on a (process 7) ended the job:", "error: rank 1 has ended its program\n")]
    assert told([Failure("rank 1 on a (process 8)", 7, "")]) == [("rank 1 on a (process 8) called sys.exit(7)", "")]


def test_a_job_that_ends_well_says_nothing() -> None:
    assert replace(END, code=0, codes=[0, 0]).told() == (0, "")
    assert replace(END, code=0, codes=[75, 0]).told() == (75, "")


def test_the_first_end_is_the_cause() -> None:
    assert replace(END, ends=[LOST, FAILED], code=KILLED).told() == (
        6,
        f"bactrian: lost {LOST.place}: killed by signal 9 (SIGKILL); the other ranks were ended\n",
    )
    assert replace(END, ends=[FAILED, LOST], code=KILLED).told() == (
        1,
        "bactrian: rank 0 on a (process 7) failed:\nValueError: boom\n",
    )


@pytest.mark.parametrize(
    ("end", "code", "cause"),
    [
        # Open MPI ends ranks of other hosts with a code of its own when one of them is killed.
        (replace(END, ends=[LOST], code=14), 6, "its process ended without a word; the other ranks were ended"),
        (replace(END, ends=[LOST], code=0), 6, "its process ended without a word; the other ranks were ended"),
        (replace(END, ends=[LOST], code=143, forced=True), 6, "without a word; the other ranks were ended"),
        (replace(END, ends=[LOST], code=KILLED, num_reported=1), 6, "ended; 1 of 2 ranks reported"),
        (replace(END, ends=[Loss(1, LOST.place, 3)], code=14), 3, f"{LOST.place}, called os._exit(3)"),
        (replace(END, ends=[Loss(1, LOST.place, 0)], code=1), 6, f"{LOST.place}, called os._exit(0)"),
        (replace(END, codes=[0, 0], code=139), 139, "mpirun ended with exit code 139, 2 of 2 ranks reported"),
        (replace(END, num_reported=0), 3, "mpirun could not start the ranks; what it printed stands above"),
        (replace(END, num_reported=0, code=5, unheard=True), 5, "its ranks did run, but could not report here"),
    ],
)
def test_other_causes(end: JobEnd, code: int, cause: str) -> None:
    assert (end.told()[0], cause in end.told()[1]) == (code, True), end.told()


SIGNALLED = "process rank 1 with PID 8 on node b exited on\nsignal 9 (Killed).\n"
GAVE_UP = 'process rank 0 with PID 7 on node a calling\n"abort". This may have caused\n'
OPEN_MPI = "MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD\n  Proc: [[7,1],1]\n  Errorcode: 7\n"
MPICH = "Abort(7) on node 1 (rank 1 in comm 0): application called MPI_Abort(MPI_COMM_WORLD, 7) - process 1\n"


@pytest.mark.parametrize(("code", "banners"), [(KILLED, SIGNALLED), (14, GAVE_UP)])
def test_mpirun_knows_better_which_of_several_was_lost_first(code: int, banners: str) -> None:
    echo = Loss(0, "rank 0 on a (process 7), in step 3 or soon after")
    for ends in ([echo, LOST], [LOST, echo]):
        told = replace(END, ends=ends, code=code, banners=banners).told()
        assert (told[0], LOST.place in told[1]) == (6, True), told
    assert echo.place in replace(END, ends=[echo], code=14, banners=GAVE_UP).told()[1]


@pytest.mark.parametrize("banners", [OPEN_MPI, MPICH, OPEN_MPI + GAVE_UP])
def test_a_script_that_aborts_gives_its_code(banners: str) -> None:
    aborted = replace(END, ends=[LOST], code=7, banners=banners)
    assert aborted.told() == (7, f"bactrian: {LOST.place}, called MPI_Abort with 7\n")
    ended = Loss(0, "rank 0")  # by mpirun for that, and heard of first
    assert replace(aborted, ends=[ended, LOST]).told() == aborted.told()
    assert replace(aborted, code=KILLED, banners=f"{banners}{SIGNALLED}").told()[0] == 6


def test_output_without_a_reader_is_the_cause_unless_a_rank_was_killed() -> None:
    unread = replace(END, ends=[LOST], unread=True)
    assert unread.told()[0] == 128 + signal.SIGPIPE
    assert replace(unread, ends=[FAILED]).told()[0] == 1
    assert replace(unread, ends=[Loss(1, LOST.place, 3)]).told()[0] == 3
    assert replace(unread, code=KILLED, banners=SIGNALLED).told()[0] == 6
    assert replace(unread, ends=[], code=0).told() == (0, "")


def test_why_a_process_ended_itself_is_not_kept_back() -> None:
    aborted = replace(END, ends=[LOST], code=128 + signal.SIGABRT, banners="check failed\n")
    assert aborted.told()[1].startswith("check failed\nbactrian: lost ")


@pytest.mark.parametrize("ends", [[LOST], [Failure("rank 0", 130, "KeyboardInterrupt\n")], [Failure("a", 6, "left\n")]])
def test_a_signal_to_stop_is_the_cause_of_what_follows_from_it(ends: list[Failure | Loss]) -> None:
    stopped = replace(END, stopped=signal.SIGTERM, ends=ends)
    assert stopped.told() == (143, "bactrian: stopped by SIGTERM: all 2 ranks were ended\n")


def test_after_a_signal_to_stop_ranks_may_end_well_or_fail() -> None:
    stopped = replace(END, stopped=signal.SIGTERM)
    assert replace(stopped, code=0, codes=[75, 75]).told() == (75, "")
    assert replace(stopped, ends=[FAILED, LOST]).told()[0] == 1  # in a save, say
    assert replace(stopped, code=-9).told()[0] == 143  # before any rank had reported


def test_a_signal_passed_on_is_a_cause_if_it_ended_a_rank() -> None:
    passed = replace(END, passed=[signal.SIGUSR1], ends=[LOST])
    assert replace(passed, code=128 + signal.SIGUSR1).told()[0] == 138
    assert replace(passed, code=KILLED).told()[0] == 6
