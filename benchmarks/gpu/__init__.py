"""Everything that there is to do on a GPU, in stages: `python3 -m benchmarks.gpu --help`, or CONTRIBUTING.md."""
