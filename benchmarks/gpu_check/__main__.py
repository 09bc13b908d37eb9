"""``python -m cpm_edge.benchmarks.gpu_check``: the subcommand without ``cpm-bench``."""

from cpm_edge.benchmarks.commands.gpu_check import gpu_check

if __name__ == "__main__":
    gpu_check(prog_name="gpu-check")
