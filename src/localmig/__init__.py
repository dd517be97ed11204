"""localmig: keeps a guest's devices alive while the process that serves them is replaced."""
