"""A chat that remembers: python examples/chat.py BUNDLE"""

from __future__ import annotations

import sys

from cpm_edge.runtimes import load


def main(folder: str) -> None:
    """Answer line by line, until end of input."""
    messages = []
    with load(folder) as model:
        for line in iter(lambda: input("you: "), ""):
            messages.append({"role": "user", "content": line})
            # The conversation so far is in the cache: only the new message is computed.
            result = model.chat(messages, max_new_tokens=256)
            print(f"model: {result.answer}")
            messages.append({"role": "assistant", "content": result.answer})


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (EOFError, KeyboardInterrupt):
        print()
