"""A process that asked for namespaces of its own never goes on in somebody else's."""

from __future__ import annotations

import subprocess
import sys


def test_where_the_kernel_has_no_network_namespace_left_nothing_is_run() -> None:
    # In a user namespace of its own, whose limits are its own as well.
    program = (
        f"echo 0 >/proc/sys/user/max_net_namespaces && exec {sys.executable} -m localmig.testing.namespace echo ran"
    )
    done = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, done
    assert done.stdout == ""
    assert done.stderr.startswith("cannot create a network namespace: No space left on device; the limit is /proc/sys/")
