"""``bactrian diff``: what differs between two saved plans."""

from __future__ import annotations

import argparse

from bactrian.driver.report.plan_diff import render_diff
from bactrian.driver.report.terminal import RichView
from bactrian.passes.plan.schema import Plan

SUMMARY = "print what differs between two saved plans"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("before", metavar="DIR1", help="the first plan")
    parser.add_argument("after", metavar="DIR2", help="the second plan")


def run(options: argparse.Namespace) -> int:
    """Carry the command out; returns its exit code."""
    RichView(render_diff(Plan.load(options.before), Plan.load(options.after))).show()
    return 0
