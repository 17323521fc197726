"""Time every method on the same pairs, each run in a process of its own, methods taking turns.

Same token ids, model, dtype and threads for all. A run loads the model, works on a small part
once, and then is timed. The rate of matrix products, measured after the runs, turns operations into
the seconds that they take at least. No speed without its error against plain loops in float64.

Other libraries run in environments of their own (`benchmarks/peers.sh` makes them). Those that are
not there or fail are named and left out, as is what would not fit into the machine's memory.
"""
