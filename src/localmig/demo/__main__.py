"""`localmig demo`, which is `python -m localmig.demo`.

Owns:        its command line, what is printed, the exit status.
Never sees:  how anything is measured.
Read next:   rounds.py for what happens, report.py and picture.py for what is told of it.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from localmig.demo import picture, vmm
from localmig.demo.guests import GUESTS, choose_guest
from localmig.demo.report import DAEMONS, VMMS, Round, counted, legend, table, verdict, vmm_legend
from localmig.demo.rounds import progress, run
from localmig.errors import LocalmigError

KERNEL_PACKAGE: Final = Path(".lab/kernel")
"""Where `make guest-kernel` unpacks it, in a source tree."""

PICTURE: Final = Path("localmig-demo.png")
"""Where people find it: in the folder they are in."""

TIMES_MAX: Final = 1000
"""Handovers one run may be asked for: what the pinger's memory has room for."""

INTERRUPTED: Final = 130
"""Exit status after Ctrl-C, as shells have it: 128 and the number of SIGINT."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="localmig demo",
        description="Replaces the daemon that serves a guest's NIC while the guest talks: by handovers, then by "
        "restarts. Touches nothing of this machine's network.",
    )
    parser.add_argument(
        "--guest",
        choices=GUESTS,
        default="builtin",
        help="builtin: a network namespace behind a virtio-net driver; qemu: Linux under QEMU; uml: User-Mode Linux "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--vmm",
        action="store_true",
        help="replace the guest's QEMU in place of its daemon, with the NIC on localmig, then on QEMU's own TAPs",
    )
    parser.add_argument("--handovers", type=int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--guest-kernel",
        type=Path,
        default=KERNEL_PACKAGE,
        metavar="FOLDER",
        help="what QEMU boots: an unpacked package of Debian's cloud kernel (default: %(default)s, where 'make "
        "guest-kernel' puts one)",
    )
    drawing = parser.add_mutually_exclusive_group()
    drawing.add_argument(
        "--picture",
        type=Path,
        default=PICTURE,
        metavar="FILE",
        help=f"draw each ping's round trip into this file: {', '.join(picture.SUFFIXES)} (default: %(default)s)",
    )
    drawing.add_argument("--no-picture", dest="picture", action="store_const", const=None, help="draw none")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON instead of the table")
    return parser


def _demonstrate(options: argparse.Namespace) -> Round:
    """Plays, prints and draws; gives the handovers. LocalmigError as `run`."""
    drawn: Path | None = options.picture
    if drawn is not None:
        picture.check_path(drawn)
        if (reason := picture.unavailable_reason()) is not None:
            progress(f"No picture will be drawn: {reason}")
            drawn = None
    times = counted(options.handovers, "time")
    naming = VMMS if options.vmm else DAEMONS
    if options.vmm:
        vmm.check_available(options.guest_kernel)
        progress(
            f"A guest is pinged every millisecond while the QEMU that runs it is replaced: {times} with its NIC on "
            "localmig, then as often with its NIC on QEMU's own TAPs."
        )
        handovers, restarts, guest = vmm.run(options.guest_kernel, times=options.handovers)
        how = vmm_legend()
    else:
        boot = choose_guest(options.guest, options.guest_kernel)
        progress(
            f"A guest is pinged every millisecond while the daemon that serves its NIC is replaced: {times} by a "
            "handover, then as often by a restart."
        )
        handovers, restarts, guest = run(boot, times=options.handovers)
        how = legend(reconnects=guest.reconnects)
    if options.json:
        sys.stdout.write(json.dumps({naming.first: handovers.facts(), naming.second: restarts.facts()}) + "\n")
    else:
        told = (table(handovers, restarts, naming), how, verdict(handovers, naming))
        sys.stdout.write("\n" + "\n\n".join(told) + "\n")
    sys.stdout.flush()
    if drawn is not None:
        picture.draw(drawn, handovers, restarts, guest=guest.name, naming=naming)
        progress(f"\nThe picture of it: {drawn.absolute()}")
    return handovers


def main(argv: Sequence[str]) -> int:
    """Runs the demonstration; 0 if the handovers did no harm, 1 if they did or it could not run."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not 1 <= options.handovers <= TIMES_MAX:
        parser.error(f"--handovers {options.handovers} is not between 1 and {TIMES_MAX}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        handovers = _demonstrate(options)
    except LocalmigError as error:
        sys.stderr.write(f"localmig: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0 if handovers.is_unharmed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
