"""Time every method on the same pairs, each run in a process of its own, methods taking turns.

    ./run_all.sh python -m icprobe.artifact.benchmark [--methods NAME ...] [--lengths grid long]
        [--train 32] [--queries 1 12 48] [--repeats 3] [--dtype float32 ...]
        [--output figures/mine]

Same token ids, model, dtype and threads for all. A run loads the model, works on a small part
once, and then is timed: wall and CPU seconds, and the process's peak memory. The rate of matrix
products, measured after the runs, turns operations into the seconds that they take at least. No
speed without its error: all pairs of some queries are compared with plain loops in float64.

Peers run in environments of their own (`benchmarks/peers.sh` makes them). Those that are not there
or fail are left out, and so is a method whose gradients would not fit into the machine's memory;
all are named.
"""
