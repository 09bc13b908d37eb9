"""An answer as it is made, and what it cost: python examples/stream.py BUNDLE "Why is the sky blue?" """

from __future__ import annotations

import sys

from cpm_edge.runtimes import load


def main(folder: str, question: str) -> None:
    """Print the pieces of one answer, then its statistics on stderr."""
    with load(folder) as model:
        stream = model.chat([{"role": "user", "content": question}], stream=True, max_new_tokens=200)
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        for name, value in stream.result.stats.rows():
            print(f"{name:12} {value}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
