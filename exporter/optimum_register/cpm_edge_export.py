"""``optimum-cli export cpm``: the same command as ``cpm-export``.

Installed as ``optimum.commands.register.cpm_edge_export``, where optimum looks for other packages' commands.
That folder is a namespace package: it must not get an ``__init__.py``.
"""

from __future__ import annotations

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class CpmExportCommand(BaseOptimumCLICommand):
    """Hands its arguments over as they are, so that the two commands cannot differ."""

    COMMAND = CommandInfo(name="cpm", help="Export MiniCPM and Llama checkpoints to cpm-edge bundles.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        # Options belong to click, --help included. With a prefix that no argument has, argparse sees none.
        parser.prefix_chars = "\0"
        parser.add_argument("arguments", nargs=REMAINDER)

    def run(self) -> None:
        # Imported here: optimum-cli loads this file for each of its commands.
        from cpm_edge.exporter.cli import main

        main(args=self.args.arguments, prog_name="optimum-cli export cpm")


REGISTER_COMMANDS = [(CpmExportCommand, ExportCommand)]
