"""`python -m brokertask.cli`: the same as `brokertask`."""

from brokertask.cli import main

if __name__ == "__main__":
    main()
