"""`python -m meteor_mini` is `meteor-mini`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
