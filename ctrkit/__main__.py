"""`python -m ctrkit`, the same command line as `ctrkit`."""

from ctrkit.cli import main

if __name__ == "__main__":
    main()
