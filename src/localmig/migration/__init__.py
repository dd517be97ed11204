"""The handover of everything a daemon holds to another daemon.

Owns:        parameters, the two handover tables and who walks them, the stream, the channel.
Never sees:  a particular device, QMP, the command line.
Read next:   handover.py, then outgoing.py and incoming.py side by side.
"""
