"""``bactrian profile-cluster``: a cluster file, measured on the devices of this host."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bactrian.driver.commands.argument_types import count, seconds
from bactrian.driver.launch.user_script import use_virtual_devices
from bactrian.driver.report.terminal import RichView

SUMMARY = "measure the devices of this host and write a cluster file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument(
        "--devices", type=count, metavar="N", help="devices (default: the host's GPUs, else 8 virtual CPU devices)"
    )
    parser.add_argument("--output", metavar="FILE", default="cluster.toml", help="the file (default: cluster.toml)")
    parser.add_argument("--force", action="store_true", help="write the file even if it is there already")
    parser.add_argument(
        "--name", type=_cluster_name, help="how reports call the cluster (default: the name of its file)"
    )
    parser.add_argument(
        "--seconds", type=seconds, default=20.0, metavar="S", help="to measure for, besides compiling (default: 20)"
    )


def run(options: argparse.Namespace) -> int:
    """Carry the command out; returns its exit code."""
    from bactrian.driver.profile.cluster_profile import check_target, cluster_text, render_profile, write_cluster

    target = Path(options.output)
    check_target(target, force=options.force)
    use_virtual_devices(options.devices or 8)
    from bactrian.driver.profile.measure_host import profile_host

    profile = profile_host(options.devices, options.seconds)
    write_cluster(target, cluster_text(profile, options.name))
    RichView(render_profile(profile)).show()
    sys.stdout.write(f"written to {target}\n")
    return 0


def _cluster_name(text: str) -> str:
    if not text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"should be a line of text, got {text!r}")
    return text
