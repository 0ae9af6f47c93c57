"""``python -m newllm.measuring layer --peers all``: ``newllm bench`` with the standard library's parser."""

from __future__ import annotations

import argparse
import sys

from newllm.measuring import SUITES


def main(argv: list[str] | None = None) -> int:
    """Measure or profile one suite and print its tables; 2 where a gate is red or a name is unknown."""
    from newllm.measuring.profiling import profiles
    from newllm.measuring.session import run
    from newllm.measuring.tables import grids, notes

    parser = argparse.ArgumentParser(prog="python -m newllm.measuring")
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--peers", default="all")
    parser.add_argument("--shapes", action="append", default=[], help="may be given several times")
    parser.add_argument("--variants", action="append", default=[], help="may be given several times")
    parser.add_argument("--device")
    parser.add_argument("--profile", action="store_true", help="time nothing, say where time goes")
    timed = parser.add_argument_group("of times")
    for name, kind in (("--out", str), ("--commit", str), ("--seconds", float)):
        timed.add_argument(name, type=kind)
    options = vars(parser.parse_args(argv))
    try:
        if options.pop("profile"):
            chosen = {name: options[name] for name in ("suite", "peers", "shapes", "variants", "device")}
            for grid in profiles(**chosen):
                print(grid.plain(), flush=True)
            return 0
        report = run(**options)
    except (ValueError, RuntimeError) as error:
        print(f"newllm.measuring: {error}", file=sys.stderr)
        return 2
    print("\n\n".join(["\n".join(notes(report)), *(grid.plain() for grid in grids(report))]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
