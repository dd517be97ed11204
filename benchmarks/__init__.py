"""What localmig costs, beside what others cost, on one machine in one run: `make bench`.

Owns:        the sections, what they run, their tables.
Never sees:  the inside of a daemon: it starts programs, asks them by QMP, and looks at them through /proc.
Read next:   __main__.py for the sections in order, report.py for a table, handovers.py for the main one.

    machine.py                         what was measured on
    sizes.py                           how much is measured
    report.py                          samples, tables, the files they end in
    native.py  lines.py                programs in C; what processes say
    flood.py   flood.c                 the flood, which proves what was lost
    site.py    guests.py               many NICs: a daemon after another, guests, the flood
    handovers.py                       section handovers
    bare.py    bare_handover.c  .py    section bare
    replacements.py                    section replacements: handover, restart, and QEMU's own migration (qemu.py)
    packet_rates.py                    section rates (rate_rigs.py: each program that moves packets)
    microbenchmarks.py                 section rust

Nothing here judges: no time is compared with a limit.
"""
