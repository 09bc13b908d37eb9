"""The subcommands of ``cpm-bench``: options here, measurements in the modules that they call."""
