"""The command line: `python -m toyworld --out data/toy --size toy`."""

import argparse
import os

import toyworld
from toyworld.world import SIZES, make_world


def main():
    parser = argparse.ArgumentParser(
        prog="python -m toyworld",
        description=toyworld.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", default="data/toy", help="folder of the world (default %(default)s)")
    add("--size", default="toy", choices=SIZES, help="how many, how large (default %(default)s)")
    add("--pictures", type=int, help="pictures of train, instead of the size's")
    add("--clips", type=int, help="clips of train, instead of the size's")
    add("--heldout", type=int, default=120, help="questions of a held-out task (%(default)s)")
    add("--seed", type=int, default=0)
    cores = min(16, os.cpu_count())
    add("--workers", type=int, default=cores, help="processes (default %(default)s)")
    args = parser.parse_args()
    world = make_world(**vars(args))
    done = "reused" if "reused" in world else f"drawn in {world['seconds']} s"
    print(f"{args.out}: {done};", world["files"] | world["lines"])


if __name__ == "__main__":
    main()
