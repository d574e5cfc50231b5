"""The command line. Each module here is one command; `console` has what all of them share."""

__all__ = ["main"]


def main() -> None:
    """Run `brokertask` with the arguments of this process."""
    # A worker's process is started from this package too, and must not pay for every command.
    from brokertask.cli.main import app

    app(prog_name="brokertask")
