"""What the package gains and costs, measured: ``python -m benchmarks --help`` lists the suites."""
