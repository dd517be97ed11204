"""The demonstration, `localmig demo`: handovers under traffic, beside restarts as people do them today.

Owns:        the two rounds, the guests that can play in them, the traffic, what is told and drawn of it.
Never sees:  the machine's network: all of it happens in namespaces that end with it. Nor the daemons' code: it runs
             `localmig run` and `localmig upgrade`, as an operator does.
Read next:   __main__.py for the command line, rounds.py for what happens, report.py and picture.py for what is
             told of it.

    host namespace                                       guest's namespace, or Linux under QEMU or User-Mode Linux
    pinger, TCP sender ─ kernel ─ tap0 ─ localmig ═ vhost-user ═ virtio-net ─ kernel ─ TCP receiver
"""
