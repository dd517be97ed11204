"""What localmig costs, beside what others cost, on one machine in one run: `make bench`.

Owns:        the sections, what they run, their tables.
Never sees:  the inside of a daemon: it starts programs, asks them by QMP, and looks at them through /proc.
Read next:   __main__.py for the sections in order, report.py for a table, handovers.py for the main one.

    machine.py                         what was measured on
    sizes.py  options.py               how much is measured; the command line
    report.py                          samples, tables, the files they end in
    native.py  lines.py  cpu.py        programs in C; what processes say, and how busy they are
    flood.py   flood.c                 the flood, which proves what was lost
    site.py    guests.py               many NICs: a daemon after another, and guests
    handovers.py                       section handovers
    bare.py    bare_handover.c  .py    section bare
    replacements.py                    section replacements (pinging.py, qemu_migration.py)
    packet_rates.py                    section rates (testpmd.py, iperf.py)
    logged_rates.py                    section logged
    microbenchmarks.py                 section rust
    compare.py                         this tree beside another commit (trees.py, comparison.py): `make bench-compare`

Nothing here judges: no time is compared with a limit.
"""
