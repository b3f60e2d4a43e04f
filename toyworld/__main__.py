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
    try:
        world = make_world(**vars(args))
    except FileExistsError as e:
        raise SystemExit(str(e)) from None
    done = "reused" if "reused" in world else f"drawn in {world['seconds']} s"
    print(f"{args.out}: {done}")
    for split in ("train", "heldout"):
        media = [f"{number} {name}" for name, number in of_split(world["files"], split)]
        lines = [f"{name} {number}" for name, number in of_split(world["lines"], split)]
        print(f"{split}: {', '.join(media)}; lines of {', '.join(lines) or 'nothing'}")


def of_split(numbers: dict[str, int], split: str) -> list[tuple[str, int]]:
    """{"train/vqa.jsonl": 7, ..} -> [("vqa", 7), ..], those of one split."""
    found = []
    for path, number in numbers.items():
        folder, _, name = path.partition("/")
        if folder == split:
            found.append((name.removesuffix(".jsonl"), number))
    return found


if __name__ == "__main__":
    main()
