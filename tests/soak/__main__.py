"""Hands over for as long as one likes: `make soak`.

    python -m tests.soak --handovers 20000 --failures 20000

Owns:        the command line, the progress, the report.
Never sees:  what is judged.
Read next:   chain.py, verdict.py.

Ends with an error where a frame was lost, came twice or in another order, where a handover did not end as it should, or
where a daemon grew.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Final

from tests.kit.fork_server import fork_server
from tests.soak.chain import NICS, Generation, Soak
from tests.soak.verdict import SAMPLE, WARM_UP, Verdict, judge_failures, judge_generations

from benchmarks.site import Footprint, namespace

TELL_EVERY: Final = 500
"""Handovers: about half a minute of them."""


def main() -> int:
    """Soaks and reports; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--handovers", type=int, default=20_000, help="that succeed (default: %(default)s)")
    parser.add_argument("--failures", type=int, default=20_000, help="handovers that fail (default: %(default)s)")
    options = parser.parse_args()
    if options.handovers < 2 * SAMPLE or options.failures < 10 * SAMPLE:
        parser.error(f"too few to compare: at least {2 * SAMPLE} handovers and {10 * SAMPLE} failures")
    began = time.monotonic()

    def tell(generation: Generation) -> None:
        if generation.number % TELL_EVERY == 0:
            kib, seconds = generation.footprint.own_bytes // 1024, time.monotonic() - began
            say(f"{generation.number} handovers in {seconds:.0f} s, {soak.traffic.received} frames, {kib} KiB")

    with namespace(), Soak(tell) as soak:
        verdicts = [judge_generations(soak.hand_over(options.handovers))]
        soak.fail_to_hand_over(WARM_UP)
        verdicts.append(judge_failures(options.failures, soak.fail_to_hand_over(options.failures)))
        soak.traffic.pause()
        counts = f"{soak.resets} resets of a driver, {soak.reconnects} reconnects of a frontend"
        server = Footprint.of(fork_server().pid)
        traffic = f"{len(NICS)} NICs, {soak.traffic.received} numbered frames both ways: all arrived, once, in order"
        verdicts.append(Verdict(facts=[counts, traffic, f"where daemons are forked: {server}"], findings=[]))
    say(f"in {time.monotonic() - began:.0f} s:")
    for verdict in verdicts:
        for fact in verdict.facts:
            say(f"  {fact}")
    findings = [finding for verdict in verdicts for finding in verdict.findings]
    for finding in findings:
        say(f"GREW: {finding}")
    return 1 if findings else 0


def say(line: str) -> None:
    """Tells people."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
